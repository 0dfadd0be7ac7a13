#!/usr/bin/env python3
"""Writes the GGUF files in this folder with llama.cpp, and what llama.cpp makes of them.

    LLAMA_CPP=.../llama.cpp LLAMA_BUILD=.../build python tests/golden/gguf/generate.py [CASE...]

LLAMA_CPP is a source tree (its converter and headers are used), LLAMA_BUILD the folder it was built in with shared
libraries (bin/libllama.so, bin/llama-quantize). The committed output was made with llama.cpp as vendored by
llama-cpp-python 0.3.36, an AVX-512 CPU, and the versions named in ../generate.py, from which the models come.

Beside each NAME.gguf (or NAME-0000i-of-0000n.gguf) stands NAME.json:

    notes            what is special about the file
    seed             of the random weights; the first that keeps the margin
    prompts[]
      text             the prompt; prompt_token_ids is what llama.cpp's tokenizer makes of it
      n_ctx            the size of the context it was run with (llama.cpp picks longrope's factors by it)
      last_logits      f32 logits at the prompt's last position, the whole vocabulary
      greedy           16 tokens of greedy decoding, the end of sequence ignored
      min_margin       the smallest gap between the best and the second-best logit on that path
    hf_cosine        the smallest cosine between last_logits and those of transformers in f32 on the file's weights

llama.cpp rounds activations: to f16 before a product with f16 weights, to 8 bits before one with quantized weights.
So its logits are near those of f32 arithmetic and not equal to them: compare by cosine. Greedy answers are stable
where min_margin is large; the seeds are chosen so that this holds for f32, f16, bf16 and Q8_0.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent
NEW_TOKENS = 16
COSINE = 0.9995


def load_script(name):
    """A script of the folder above, under a name that is not this one's."""
    spec = importlib.util.spec_from_file_location(f"golden_{name}", HERE.parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


families = load_script("generate")
COMMON, KIN, FALCON, GEMMA2, LOUD, GEMMA_LOUD = (
    getattr(families, n) for n in "COMMON KIN FALCON GEMMA2 LOUD GEMMA_LOUD".split())
PROMPTS = families.PROMPTS
SPM_VOCAB = 320

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}
# The largest hidden size that stays small on disk; blocks of K-quants are 256 values of a row.
QUANTIZED = dict(KIN, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=8,
                 num_key_value_heads=2, tie_word_embeddings=True)
QUANTIZED_TYPES = ["F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_K_M"]
WHOLE = [(text, 256) for text in PROMPTS]

# name: (config as in ../generate.py, how it is stored there, what is special here)
#   pre      the name of the pre-tokenizer, for the BPE vocabulary; spm: a SentencePiece vocabulary instead
#   types    what the converter writes, one file each; quantize: what llama-quantize makes of the f32 file
#   margin   the smallest gap wanted on the greedy paths
CASES = {
    "llama": (KIN, dict(family="llama", dtype="float16"), dict(
        pre="llama-bpe", types=["f32", "bf16", "f16"], margin=0.03,
        notes="Llama, 4 heads over 2 KV heads, untied; rows of q and k in the converter's order.")),
    "llama_spm": (dict(KIN, vocab_size=SPM_VOCAB), dict(family="llama", dtype="float16"), dict(
        spm=True, notes="A SentencePiece vocabulary with byte fallback, a space put before the text.")),
    "llama3_rope": (dict(KIN, head_dim=16, rope_scaling=LLAMA3_ROPE), dict(family="llama", dtype="float16"), dict(
        pre="llama-bpe", notes="Llama 3.1 scaling: the factors of the frequencies are the tensor rope_freqs.weight.")),
    "llama_split": (KIN, dict(family="llama", dtype="float16"), dict(
        pre="llama-bpe", split=8, notes="The tensors in three files, NAME-0000i-of-00003.gguf.")),
    "llama_quantized": (QUANTIZED, dict(family="llama", weights=dict(spread=0.085, embedding_spread=0.15)), dict(
        pre="llama-bpe", types=["f32"], quantize=QUANTIZED_TYPES, margin=0.05,
        notes="Made by llama-quantize from f32, --pure but for the last: every matrix has the type in the name. "
              "Q4_K_M mixes Q4_K and Q6_K.")),
    "mistral_nemo": (dict(KIN, head_dim=24, sliding_window=None, rope_theta=1000000.0),
                     dict(family="mistral", dtype="float16"), dict(
        pre="tekken", notes="head_dim is 24 where hidden_size / heads is 16.")),
    # The converter asks for num_kv_heads, which transformers would otherwise put at the number of heads.
    "falcon_7b": (dict(FALCON, hidden_size=56, num_attention_heads=7, num_kv_heads=1),
                  dict(family="falcon", dtype="float16"), dict(
        pre="falcon", notes="7 heads over 1 KV head, one LayerNorm, tied.")),
    "falcon_40b": (dict(FALCON, new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False),
                   dict(family="falcon", dtype="float16"), dict(
        pre="falcon",
        notes="8 heads over 2 KV heads, attn_norm before the MLP and attn_norm_2 before attention, untied. The converter "
              "puts all q before all k before all v.")),
    "qwen2": (KIN, dict(family="qwen2", dtype="float16"), dict(pre="qwen2", notes="Biases on q, k and v.")),
    "qwen3": (dict(KIN, head_dim=24, tie_word_embeddings=True), dict(family="qwen3", **LOUD, dtype="float16"), dict(
        pre="qwen2", notes="Norms over each head of q and k, head_dim 24, tied.")),
    "phi3": (dict(KIN, num_key_value_heads=4, sliding_window=512, vocab_size=SPM_VOCAB),
             dict(family="phi3", dtype="float16"), dict(
        # llama.cpp looks for Phi-3's own tokens in a model that is called so.
        spm=True, title="small", notes="Fused q, k, v and gate, up. llama.cpp reads the window and does not use it.")),
    "phi4_mini": (dict(KIN, max_position_embeddings=1024, original_max_position_embeddings=256, sliding_window=None,
                       partial_rotary_factor=0.75, tie_word_embeddings=True, rope_scaling={
                           "rope_type": "longrope", "short_factor": families.SHORT_FACTOR[:6],
                           "long_factor": families.LONG_FACTOR[:6]}),
                  dict(family="phi3", **LOUD, dtype="float16"), dict(
        pre="gpt-4o", gpt2_class=True, prompts=WHOLE[:3] + [(" ".join([PROMPTS[3]] * 3), 512)],
        notes="longrope: rope_factors_short.weight up to 256 positions, rope_factors_long.weight in the last prompt, "
              "which is longer; 12 of 16 values of a head are rotated; tied.")),
    "gemma2": (dict(GEMMA2, query_pre_attn_scalar=24, vocab_size=SPM_VOCAB, attn_logit_softcapping=2.0,
                    final_logit_softcapping=5.0), dict(family="gemma2", **GEMMA_LOUD, dtype="float16"), dict(
        spm=True, margin=0.01,
        notes="Soft-capping of scores and logits, window 16 in layer 0; the converter adds one to the norms.")),
    "gemma3": (dict(GEMMA2, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                    query_pre_attn_scalar=16, intermediate_size=32, vocab_size=SPM_VOCAB, rope_theta=1000000.0,
                    rope_local_base_freq=10000.0, rope_scaling={"rope_type": "linear", "factor": 8.0}),
               dict(family="gemma3_text", **GEMMA_LOUD, dtype="float16"), dict(
        spm=True, margin=0.01,
        notes="Norms over each head of q and k; layers 0 to 4 have a window of 16 and base 10000, layer 5 sees "
              "everything with base 1000000 and linear scaling by 8.")),
    "mixtral": (dict(KIN, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
                dict(family="mixtral", dtype="float16"), dict(
        pre="llama-bpe", notes="4 experts, 2 a token; architecture llama, a layer's experts in one tensor.")),
    "qwen3_moe": (dict(KIN, head_dim=24, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
                       norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=True),
                  dict(family="qwen3_moe", **LOUD, dtype="float16"), dict(
        pre="qwen2", notes="8 experts, 2 a token, weights normalized to one.")),
}


# --------------------------------------------------------------------------------------------------
# Models and files
# --------------------------------------------------------------------------------------------------

def write_sentencepiece(folder, name):
    """A SentencePiece vocabulary as Llama 2's (or Gemma's): specials, 256 bytes, pieces learnt from the prompts."""
    import sentencepiece
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(PROMPTS + ["the cat and the dog ran to the other farm"] * 4) + "\n")
    gemma = name.startswith("gemma")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=SPM_VOCAB, model_type="bpe",
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity", num_threads=1,
        remove_extra_whitespaces=False, add_dummy_prefix=not gemma, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        minloglevel=2)
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    families.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "GemmaTokenizer" if gemma else "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>",
        "eos_token": "</s>", "pad_token": "<pad>", "add_bos_token": True, "add_eos_token": False})


def write_tokenizer(folder, name, case):
    if case.get("spm"):
        return write_sentencepiece(folder, name)
    families.write_tokenizer(folder)
    if case.get("gpt2_class"):  # Phi-4: the converter tells it from Phi-3 by this
        path = folder / "tokenizer_config.json"
        families.write_json(path, {**json.loads(path.read_text()), "tokenizer_class": "GPT2Tokenizer"})


def convert(source, target, name, case, kind):
    """Runs convert_hf_to_gguf.py, with the name of the pre-tokenizer given: it knows those of released models only."""
    import convert_hf_to_gguf as converter
    logging.disable(logging.WARNING)
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: case["pre"]
    split = ["--split-max-tensors", str(case["split"])] if "split" in case else []
    argv, sys.argv = sys.argv, ["", str(source), "--outfile", str(target), "--outtype", kind,
                          "--model-name", case.get("title", name), *split]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            converter.main()
    finally:
        sys.argv = argv


def quantize(tools, source, target, kind):
    pure = [] if kind.endswith("_M") or kind == "F16" else ["--pure"]
    subprocess.run([tools.quantize, *pure, source, target, kind, "1"], check=True, capture_output=True)


class Tools:
    """What was built of llama.cpp, and the program beside this script."""

    def __init__(self, source, build, folder):
        libraries = build / "bin"
        self.quantize = libraries / "llama-quantize"
        self.reference = folder / "reference"
        subprocess.run(
            ["c++", "-O1", "-std=c++17", f"-I{source}/include", f"-I{source}/ggml/include", HERE / "reference.cpp",
             "-o", self.reference, f"-L{libraries}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}"],
            check=True)

    def run(self, model, prompts, adapter=None):
        out = []
        for text, n_ctx in prompts:
            done = subprocess.run(
                [self.reference, model, str(n_ctx), str(NEW_TOKENS), adapter or "-", "1", text],
                check=True, stdout=subprocess.PIPE)
            answer = json.loads(done.stdout)["prompts"][0]
            answer["last_logits"] = families.f32(answer["last_logits"])
            out.append({"text": text, "n_ctx": n_ctx, **answer})
        return out


# --------------------------------------------------------------------------------------------------
# The same weights in transformers
# --------------------------------------------------------------------------------------------------

def load_model(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def put_weights(model, path):
    """Replaces the weights of a Llama by those of a GGUF file."""
    import gguf
    config, state = model.config, {}
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    layer = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.name.removesuffix(".weight")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name.startswith("blk."):
            _, index, name = name.split(".")
            if name in ("attn_q", "attn_k"):  # the converter's order of rows: pairs side by side
                heads = config.num_attention_heads if name == "attn_q" else config.num_key_value_heads
                values = values.reshape(heads, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
            full = f"model.layers.{index}.{layer[name]}"
        else:
            full = names[name]
        state[full + ".weight"] = torch.from_numpy(np.array(values))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)


def own_answer(model, ids):
    """Last logits, greedy tokens and the smallest margin, in f32 without a cache."""
    logits, margin, ids, start = None, math.inf, list(ids), len(ids)
    for _ in range(NEW_TOKENS):
        last = families.forward(model, ids)[-1]
        logits = last if logits is None else logits
        top = last.topk(2)
        margin = min(margin, (top.values[0] - top.values[1]).item())
        ids.append(top.indices[0].item())
    return logits.double(), ids[start:], margin


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def agreement(model, prompts, must_match):
    """The smallest cosine of the last logits; None where a greedy path differs that must not."""
    smallest = 1.0
    for prompt in prompts:
        logits, greedy, _ = own_answer(model, prompt["prompt_token_ids"])
        smallest = min(smallest, cosine(logits, torch.tensor(prompt["last_logits"]).double()))
        if must_match and greedy != prompt["greedy"]:
            return None
    return smallest


# --------------------------------------------------------------------------------------------------

def good_seeds(folder, name, case, tools):
    """Yields seeds whose greedy paths keep the margin in f32; the model with that seed is then in `folder`."""
    _, how, _ = CASES[name]
    ids = None
    for seed in range(1, 400):
        families.write_model(folder, name, seed)
        if ids is None:
            probe = folder.parent / "probe.gguf"
            convert(folder, probe, name, {**case, "split": 0} if "split" in case else case, "f32")
            ids = [p["prompt_token_ids"] for p in tools.run(probe, case.get("prompts", WHOLE))]
        model = load_model(folder)
        gaps = families.watch_routing(model)
        for prompt in ids:
            _, greedy, margin = own_answer(model, prompt)
            if margin < case.get("margin", 0.02) or len(set(greedy)) < 5 or min(gaps, default=1.0) < 4e-3:
                break
        else:
            yield seed


def make_files(folder, name, case, tools):
    """One attempt: the files of a case, as {name of the file: (path, answers of llama.cpp)}."""
    prompts, made = case.get("prompts", WHOLE), {}
    for kind in case.get("types", ["f16"]):
        stem = f"{name}_{kind}" if len(case.get("types", ["f16"])) > 1 else name
        target = folder.parent / f"{stem}.gguf"
        convert(folder, target, name, case, kind)
        first = next(iter(sorted(folder.parent.glob(f"{stem}-00001-of-*.gguf"))), target)
        made[stem] = first
    if "quantize" in case:
        (source,) = made.values()
        made = {}
        for kind in case["quantize"]:
            made[f"{name}_{kind.lower()}"] = folder.parent / f"{name}_{kind.lower()}.gguf"
            quantize(tools, source, made[f"{name}_{kind.lower()}"], kind)
    return {stem: (path, tools.run(path, prompts)) for stem, path in made.items()}


def make_case(name, tools):
    config, how, case = CASES[name]
    families.CASES[name] = (config, {"notes": "", **how})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        write_tokenizer(folder, name, case)
        for seed in good_seeds(folder, name, case, tools):
            made, model, results = make_files(folder, name, case, tools), load_model(folder), {}
            for stem, (path, prompts) in made.items():
                if "types" in case:
                    put_weights(model, path)
                stable = not stem.endswith(("_k", "_k_m", "_q4_0", "_q4_1", "_q5_0", "_q5_1"))
                results[stem] = agreement(model, prompts, stable)
            if all(r and r >= COSINE for r in results.values()):
                break
            print(f"{name}: seed {seed}: transformers and llama.cpp differ: {results}", flush=True)
        else:
            raise SystemExit(f"{name}: no seed will do")
        for stem, (path, prompts) in made.items():
            files = sorted(path.parent.glob(stem + "-0*")) or [path]
            for file in files:
                shutil.copyfile(file, HERE / file.name)
            families.write_golden(HERE / f"{stem}.json", {
                "case": stem, "files": [f.name for f in files], "notes": case["notes"], "seed": seed,
                "hf_cosine": float(f"{results[stem]:.7f}"), "prompts": prompts})
            print(f"{stem}: seed {seed}, margin {min(p['min_margin'] for p in prompts)}, cosine {results[stem]:.7f}, "
                  f"{sum(f.stat().st_size for f in files) / 1024:.0f} KB", flush=True)


# --------------------------------------------------------------------------------------------------
# A LoRA adapter
# --------------------------------------------------------------------------------------------------

ADAPTER = dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])


def make_adapter(tools):
    """llama_lora.gguf, an adapter for llama_f32.gguf (the case before it) made by convert_lora_to_gguf.py."""
    base, (config, how, case) = HERE / "llama_f32.gguf", CASES["llama"]
    sys.modules["generate"] = families
    adapters = load_script("adapters")
    families.CASES["llama"] = (config, {"notes": "", **how})
    with tempfile.TemporaryDirectory() as scratch:
        folder, tuned = Path(scratch) / "llama", Path(scratch) / "adapter"
        folder.mkdir()
        write_tokenizer(folder, "llama", case)
        families.write_model(folder, "llama", json.loads(base.with_suffix(".json").read_text())["seed"])
        for seed in range(1, 400):
            peft = adapters.adapt(load_model(folder), ADAPTER, seed, torch.float16)
            adapters.save(peft, tuned, torch.float32)
            path = Path(scratch) / "llama_lora.gguf"
            subprocess.run([sys.executable, Path(os.environ["LLAMA_CPP"]) / "convert_lora_to_gguf.py", tuned, "--base",
                            folder, "--outfile", path, "--outtype", "f16"], check=True, capture_output=True)
            prompts = tools.run(base, WHOLE, path)
            result = agreement(peft.get_base_model(), prompts, True)
            if result and result >= COSINE and min(p["min_margin"] for p in prompts) >= 0.03:
                break
        else:
            raise SystemExit("llama_lora: no seed will do")
        shutil.copyfile(path, HERE / path.name)
        families.write_golden(HERE / "llama_lora.json", {
            "case": "llama_lora", "base": base.name, "files": [path.name], "seed": seed,
            "notes": "A LoRA adapter for q, k, v and ffn_down, scaled by alpha / r = 2, run on the base file named here.",
            "hf_cosine": float(f"{result:.7f}"), "prompts": prompts})
        print(f"llama_lora: seed {seed}, margin {min(p['min_margin'] for p in prompts)}, cosine {result:.7f}, "
              f"{path.stat().st_size / 1024:.0f} KB", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cases", nargs="*", help="names of cases; all by default")
    args = p.parse_args()
    source, build = Path(os.environ["LLAMA_CPP"]), Path(os.environ["LLAMA_BUILD"])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        tools = Tools(source, build, Path(scratch))
        for name in args.cases or [*CASES, "llama_lora"]:
            make_adapter(tools) if name == "llama_lora" else make_case(name, tools)


if __name__ == "__main__":
    main()
