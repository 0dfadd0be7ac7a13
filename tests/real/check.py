#!/usr/bin/env python3
"""farm's tokenizers and chat templates against the libraries that real files belong to.

    cargo build --example texts
    python tests/real/check.py FOLDER LLAMA_CPP LIBLLAMA.so [TEXTS] [--what templates] [--only NAME]

FOLDER takes the files (300 MB, downloaded once); LLAMA_CPP is llama.cpp's source, whose models/ holds vocabularies and
templates; LIBLLAMA.so that source built as a shared library; TEXTS the example, else target/debug/examples/texts. Needs
pip, npm and what tests/golden/tokenizers/generate.py imports. Prints a row for each file: texts that differ.

Vocabularies see the 5,000 texts of tests/golden/tokenizers and those of llama.cpp's own tests (models/*.inp).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "golden" / "tokenizers")]

import tiktoken
from generate import Llama, SpmReference
from gguf import GGUFReader
from packages import gemma3_270m, package
from sentencepiece import sentencepiece_model_pb2 as spm_proto
from tiktoken.load import load_tiktoken_bpe
from tokenizers import Tokenizer
from transformers.utils import chat_template_utils

ARGUMENTS = argparse.ArgumentParser()
for name in ("folder", "llama_cpp", "libllama"):
    ARGUMENTS.add_argument(name, type=Path)
ARGUMENTS.add_argument("texts", nargs="?", default=HERE.parents[1] / "target/debug/examples/texts", type=Path)
ARGUMENTS.add_argument("--what", choices=["all", "vocabularies", "templates"], default="all")
ARGUMENTS.add_argument("--only", default="", help="files whose name has this in it")


# --------------------------------------------------------------------------------------------------
# Vocabularies
# --------------------------------------------------------------------------------------------------


def hard_texts(llama_cpp):
    lines = (HERE.parent / "golden/tokenizers/texts.jsonl").read_text().split("\n")
    texts = [json.loads(line) for line in lines if line]
    for path in sorted((llama_cpp / "models").glob("*.inp")):
        texts += path.read_text().split("\n__ggml_vocab_test__\n")
    return list(dict.fromkeys(texts))


def json_files(folder):
    """tokenizer.json: the tokenizers library."""
    for key in ("mistral_v1", "llama3", "llama3_1", "qwen3", "gemma3", "deepseek_v3"):
        path = package(folder, key) / "models"
        reference = Tokenizer.from_file(str(path / "tokenizer.json"))
        yield f"{key} tokenizer.json", path, {
            "ids": lambda text: reference.encode(text).ids,
            "plain": lambda text: reference.encode(text, add_special_tokens=False).ids,
            "text": lambda ids: reference.decode(ids),
            "spelled": lambda ids: reference.decode(ids, skip_special_tokens=False),
        }


def sentencepiece_files(folder, llama_cpp, scratch):
    """tokenizer.model: sentencepiece, the text cut at control symbols. Those of Llama 2 and Gemma 3 are made from GGUF files,
    which keep all of them."""
    data = package(folder, "mistral") / "mistral_common/data"
    models = {f"mistral {name}": (data / name).read_bytes() for name in (
        "tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2", "mistral_instruct_tokenizer_240323.model.v3",
        "mistral_instruct_tokenizer_241114.model.v7")}
    models["llama 2 tokenizer.model"] = sentencepiece_model(llama_cpp / "models/ggml-vocab-llama-spm.gguf", True)
    models["gemma 3 tokenizer.model"] = sentencepiece_model(gemma3_270m(folder), False)
    for name, blob in models.items():
        yield name, *sentencepiece_file(blob, scratch / re.sub(r"\W", "_", name))


def field(path, name):
    return GGUFReader(path).fields[f"tokenizer.ggml.{name}"].contents()


def sentencepiece_model(path, add_dummy_prefix):
    """SentencePiece's own file again from a GGUF file's vocabulary."""
    proto = spm_proto.ModelProto()
    proto.trainer_spec.model_type = spm_proto.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    for name, key in (("unk_id", "unknown"), ("bos_id", "bos"), ("eos_id", "eos")):
        setattr(proto.trainer_spec, name, field(path, f"{key}_token_id"))
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    for piece, score, kind in zip(*(field(path, name) for name in ("tokens", "scores", "token_type")), strict=True):
        # SentencePiece spells spaces, and cuts user-defined symbols out, after it has escaped them.
        proto.pieces.add(piece=piece.replace(" ", "\u2581"), score=score, type=kind)
    return proto.SerializeToString()


def sentencepiece_file(blob, path):
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(blob)
    reference = SpmReference(path / "tokenizer.model")
    special = set(reference.special.values())
    return path, {
        "ids": reference.with_bos,
        "plain": reference.encode,
        "text": lambda ids: reference.whole.decode([i for i in ids if i not in special]),
    }


def tiktoken_files(folder, scratch):
    """Llama 3's tokenizer.model: tiktoken with the special tokens of Meta's own code."""
    source = package(folder, "llama") / "llama_models/llama3"
    path = scratch / "llama3_tiktoken"
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    ranks = load_tiktoken_bpe(str(path / "tokenizer.model"))
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
             "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
             "<|python_tag|>", "<|image|>"]
    names += [f"<|reserved_special_token_{2 + i}|>" for i in range(256 - len(names))]
    pattern = re.search(r'pat_str = r"(.*)"', (source / "tokenizer.py").read_text()).group(1)
    reference = tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=ranks, special_tokens={name: len(ranks) + i for i, name in enumerate(names)})
    yield "llama 3 tokenizer.model (tiktoken)", path, {
        "ids": lambda text: [len(ranks), *reference.encode(text, allowed_special="all")],
        "plain": lambda text: reference.encode(text, allowed_special="all"),
        "text": lambda ids: reference.decode([i for i in ids if i < len(ranks)]),
        "spelled": reference.decode,
    }


def gguf_files(arguments):
    """llama.cpp's vocabularies: llama_tokenize."""
    llama = Llama(str(arguments.libllama))
    for path in [*sorted((arguments.llama_cpp / "models").glob("*.gguf")), gemma3_270m(arguments.folder)]:
        try:
            llama.load(path)
        except AssertionError:
            print(f"{path.name}: llama.cpp does not load it")
            continue
        yield path.name, path, {
            "ids": lambda text: llama.encode(text, True),
            "plain": lambda text: llama.encode(text, False),
        }
        ends = ask(arguments.texts, "ends", path, [])
        missing = set(llama.ends(len(field(path, "tokens")))) - set(*ends)
        print(f"    ends: {ends}; llama.cpp's other ones: {[field(path, 'tokens')[i] for i in missing]}")
        llama.free()


def ask(texts, what, model, lines):
    """farm's answers: one a line, or its error message."""
    data = "".join(json.dumps(line) + "\n" for line in lines)
    done = subprocess.run([texts, what, model], input=data, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip()
    return [json.loads(line) for line in done.stdout.split("\n") if line]


def compare(name, answers, reference, texts):
    if isinstance(answers, str):
        print(f"{name}: refused: {answers[:300]}")
        return
    wrong = {}
    for text, answer in zip(texts, answers, strict=True):
        for kind, function in reference.items():
            want = function(text if kind in ("ids", "plain") else answer["plain"])
            if answer[kind] != want:
                wrong.setdefault(kind, []).append((text, answer[kind], want))
        # A character that is not whole is held back and comes at the end.
        if answer["streamed"] != answer["text"] and "\ufffd" not in answer["text"]:
            wrong.setdefault("streamed", []).append((answer["plain"], answer["streamed"], answer["text"]))
    counts = {kind: len(wrong.get(kind, [])) for kind in [*reference, "streamed"]}
    print(f"{name}: {len(texts)} texts; differing: {counts}", flush=True)
    for kind, cases in wrong.items():
        for text, got, want in cases[:3]:
            print(f"    {kind} of {text!r}:\n      farm {got!r}\n      want {want!r}")


def vocabularies(arguments):
    texts = hard_texts(arguments.llama_cpp)
    with tempfile.TemporaryDirectory() as scratch:
        files = [json_files(arguments.folder), sentencepiece_files(arguments.folder, arguments.llama_cpp, Path(scratch)),
                 tiktoken_files(arguments.folder, Path(scratch)), gguf_files(arguments)]
        for name, path, reference in (entry for form in files for entry in form):
            if arguments.only in name:
                compare(name, ask(arguments.texts, "encode", path, texts), reference, texts)


# --------------------------------------------------------------------------------------------------
# Chat templates
# --------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "temperature", "description": "The temperature at a place, in °C", "parameters": {
    "type": "object", "properties": {"place": {"type": "string", "description": "A town"}, "unit": {"type": "string", "enum": ["C", "F"]}}, "required": ["place"]}}}


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


def conversations():
    system, user = turn("system", "You are terse."), turn("user", "How are you?")
    answer = turn("assistant", "Well, thank you.")
    odd = "  {{ bos_token }} {% if x %} {# c #} </s> <|im_end|> <|eot_id|> [/INST] <end_of_turn> 'é' \"q\" \\ 🐄\n\n"
    call = turn("assistant", "", tool_calls=[{"id": "abcdefghi", "type": "function", "function": {"name": "temperature", "arguments": {"place": "Zürich", "unit": "C"}}}])
    result = turn("tool", "{\"t\": 21.5}", name="temperature", tool_call_id="abcdefghi")
    chats = {
        "user": [user],
        "system": [system, user],
        "turns": [user, answer, user],
        "system, turns": [system, user, answer, user, answer, user],
        "empty contents": [turn("system", ""), turn("user", ""), turn("assistant", ""), turn("user", "")],
        "odd contents": [turn("system", odd), turn("user", odd), turn("assistant", odd), turn("user", odd)],
        "thoughts": [user, turn("assistant", "<think>\nhm\n</think>\n\nWell."), user],
        "reasoning": [user, turn("assistant", "Well.", reasoning_content="hm"), user],
        "two of the user": [user, user],
        "the assistant last": [user, answer],
        "an unknown role": [turn("narrator", "It rains."), user],
    }
    cases = {f"{name}, add_generation_prompt {add}": dict(messages=chat, tools=None, add_generation_prompt=add) for name, chat in chats.items() for add in (True, False)}
    for name, chat in {"tools": [user], "system, tools": [system, user], "a call": [user, call, result], "a call answered": [system, user, call, result, answer, user]}.items():
        cases[name] = dict(messages=chat, tools=[TOOL], add_generation_prompt=True)
    cases["no thinking"] = dict(messages=[user], tools=None, add_generation_prompt=True, enable_thinking=False)
    return cases


def template_folders(folder, llama_cpp, scratch):
    for key in ("llama3", "llama3_1", "qwen3", "gemma3", "deepseek_v3"):
        yield f"{key} tokenizer_config.json", package(folder, key) / "models"
    for path in sorted((llama_cpp / "models/templates").glob("*.jinja")):
        model = scratch / path.stem
        model.mkdir()
        (model / "chat_template.jinja").write_bytes(path.read_bytes())
        (model / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
        yield path.name, model


def reference_template(model):
    """transformers' own environment, with the clock of texts.rs."""
    class Clock(chat_template_utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 11, 21, 12)

    chat_template_utils.datetime = Clock
    config = json.loads((model / "tokenizer_config.json").read_text())
    file = model / "chat_template.jinja"
    source = file.read_text() if file.is_file() else config["chat_template"]
    names = {name: value["content"] if isinstance(value, dict) else value for name, value in config.items() if name.endswith("_token") and isinstance(value, (str, dict))}
    compiled = chat_template_utils._compile_jinja_template(source)
    return lambda case: compiled.render(documents=None, **names, **case)


def templates(arguments):
    cases = conversations()
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in template_folders(arguments.folder, arguments.llama_cpp, Path(scratch)):
            if arguments.only not in name:
                continue
            reference = reference_template(model)
            answers = ask(arguments.texts, "render", model, cases.values())
            if isinstance(answers, str):
                print(f"{name}: {answers[:300]}")
                continue
            wrong, refused = [], 0
            for (case, variables), answer in zip(cases.items(), answers, strict=True):
                try:
                    want = reference(variables)
                except Exception as error:
                    want = f"{type(error).__name__}: {error}"
                    refused += 1
                    same = "error" in answer
                else:
                    same = answer.get("text") == want
                if not same:
                    wrong.append((case, answer, want))
            print(f"{name}: {len(cases)} conversations, {refused} of them refused; differing: {len(wrong)}", flush=True)
            for case, answer, want in wrong[:3]:
                print(f"    {case}:\n      farm {answer}\n      want {want!r}")


if __name__ == "__main__":
    given = ARGUMENTS.parse_args()
    if given.what in ("all", "vocabularies"):
        vocabularies(given)
    if given.what in ("all", "templates"):
        templates(given)
