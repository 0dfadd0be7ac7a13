#!/usr/bin/env python3
"""Writes the tokenizers in this folder and what their own libraries make of 5,000 hard texts.

    python tests/golden/tokenizers/generate.py LIBLLAMA.so

LIBLLAMA.so is llama.cpp built as a shared library. The committed output was made with
Python 3.11, sentencepiece 0.2.3, tokenizers 0.23.3, transformers 5.23.0, tiktoken 0.14.0,
gguf 0.19.0 and the llama.cpp that llama-cpp-python 0.3.36 vendors.

    texts.jsonl        the texts, one JSON string a line
    KIND/              the tokenizer, as a user would have it, or metadata.json, the
                       key-value pairs of a GGUF file that holds it
    NAME.crc32         for each text the CRC-32 (u32, little-endian) of its reference ids,
                       themselves u32, little-endian
    references.json    for each NAME: the kind, the library, the ids of the first 100 texts
                       in full, whether BOS was added, changed metadata, which texts come
                       back from decoding (`round_trips`, a bit a text, hexadecimal, the
                       first text lowest), and in how many texts another library differs
                       (`differs`)

References: sentencepiece for tokenizer.model (a text is cut at control symbols and at
<unk>, as Hugging Face does; only a part that begins the text gets the dummy prefix, or,
`legacy`, every part), tokenizers for tokenizer.json, tiktoken for Llama 3's files,
llama_tokenize with parse_special for GGUF.
"""

import base64
import ctypes
import json
import random
import re
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import gguf
import sentencepiece as spm
import tiktoken
from sentencepiece import sentencepiece_model_pb2 as spm_proto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).resolve().parent
NUM_TEXTS = 5000
NUM_FULL = 100

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

PRE_TYPES = [
    "default", "llama-bpe", "dbrx", "glm4", "qwen2", "qwen35", "gpt-2", "starcoder", "falcon", "tekken",
    "gpt-4o", "deepseek-llm", "deepseek-coder", "deepseek-v3", "bailingmoe", "seed-coder",
]

# --------------------------------------------------------------------------------------------------
# Texts
# --------------------------------------------------------------------------------------------------

TRAINING = """
The farm lies by the river, and the farmer's daughter doesn't know that the sheep have left the meadow.
She'll go out at 5:30 in the morning, 12 miles or so, and they'd better be there; we've seen 1234567 of
them since 1999. "I'm not sure," she said, "it's 3.14159 miles (or more) -- isn't it?" HTTP/1.1 200 OK.
def main(argv: list[str]) -> int:
    for i in range(10):
        print(f"{i} * {i} = {i * i}")   # squares
    return 0
fn main() { let x = vec![1, 2, 3]; println!("{:?}", x); } // <html><body class="x">&amp;</body></html>
Die Kühe stehen auf der Wiese, während der Bauer über die Straße geht; größer wäre schöner. Où est la
ferme ? L'été à Genève, c'est très naïf, garçon. El niño comió piñas en la montaña mañana por la mañana.
Ферма стоит у реки, и дочь фермера не знает, что овцы ушли с луга. Сегодня хорошая погода.
農場は川のそばにあります。羊たちは牧草地を離れました。今日はいい天気ですね。カタカナとひらがな。
农场在河边,农夫的女儿不知道羊已经离开了草地。今天天气很好,我们去散步吧。 농장은 강가에 있습니다.
المزرعة تقع على ضفة النهر والأغنام غادرت المرعى. החווה נמצאת ליד הנהר. खेत नदी के किनारे है। ฟาร์มอยู่ริมแม่น้ำ
😀 😃 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 → ← ≤ ≥ ∑ ∞ € £ ¥ © ® ™ … – — “quoted” ‘single’ «guillemets» ½ ² ﬁ ﬂ Ⅳ ① ㍿ Ａ１
"""

SPECIALS = [
    "<s>", "</s>", "<unk>", "<pad>", "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>",
    "<|im_end|>", "<|endoftext|>", "<|start_header_id|>", "<start_of_turn>", "<0x0A>", "<|user|>", "<user>",
    "[INST]", "<|reserved_special_token_7|>", "<|eot_id", "|>", "<|", "<\u2581s>", "<s", "\u2581", "<tool>",
]
SPACES = [" ", "  ", "   ", "      ", "\t", "\t\t", "\n", "\n\n", "\n\n\n\n", "\r\n", "\r", " \n", "\n ", "\t \n", "\u00a0", "\u3000", "\u2003", "\u200b", "\ufeff", "\v", "\f", "\x85", "\u2028"]
ODD = [
    "\0", "\x01", "\x7f", "\x1b[0m", "\ufffd", "\ufffd\ufffd", "e\u0301", "a\u0308\u0323", "\u0301", "n\u0303o", "क्षि", "ก็", "\u202eabc\u202c",
    "\u200d", "👨‍👩‍👧‍👦", "🏴\U000e0067\U000e0062\U000e007f", "👍🏿", "🇩🇪🇫🇷", "☃️", "𝕏", "𐍈", "𠀀", "㐀", "\U0010ffff", "\ue000", "\u00ad", "ſ's", "'ſ", "İi", "ǅ", "ʼn", "ß", "ﬃ", "Å", "\u212b",
    "½", "²³", "١٢٣", "①②", "Ⅷ", "๑๒", "1٢3", "㍿", "ｶﾞ", "Ａｂｃ１２", "한글", "\u1112\u1161\u11ab", "ــ", "لا", "שָׁלוֹם", "«»", "‚„", "$€£¥", "^`~|<>=+", "_", "__init__", "a_b", "\\", "\"", "''", "'S", "'LL", "'Re", "’s", "I'M", "don't", "DON'T", "x'y", "'d've", "...", "…", "---", "!!!", "?!", "/*", "*/", "//", "#", "@user", "100%", "a.b", "a,b", "3.14", "1,000,000", "0x1F", "12345678901234567890", "2024-01-01T00:00:00Z", "CamelCaseWord", "camelCase", "HTMLParser", "XMLHttpRequest2", "ÄÖÜäöü", "ÉCOLE", "ПРИВЕТ", "iPhone", "aB", "Ab", "AB", "ABc", "tEsT",
]


def words():
    return re.findall(r"\S+", TRAINING)


def make_texts():
    rng = random.Random(20260)
    vocabulary = words()
    pieces = [vocabulary, vocabulary, vocabulary, SPECIALS, SPACES, SPACES, ODD, ODD]
    texts = ["", " ", "  ", "\n", "\t", "\0", "a", " a", "a ", " a ", "  a  b  ", "\u2581", "<s>", "<s> a", " <s>a", "<s><s>", "</s>", "a</s>b", "<|eot_id|> a", "\r\n\r\n"]
    texts += SPECIALS + SPACES + ODD + [f" {x}" for x in ODD] + [f"{x} " for x in SPACES]
    texts += ["a" * n for n in (2, 3, 7, 50, 200)] + [" " * n for n in (16, 17, 33, 64)] + ["ab" * 100, "aab" * 40, "\n" * 20, "=" * 80, "1" * 40, "😀" * 20, "に" * 30, "the" * 50, "thethe farm" * 10]

    def any_character():
        low, high = rng.choice([(0, 0x7f), (0x80, 0x24f), (0x250, 0x7ff), (0x800, 0x1fff), (0x2000, 0x2bff), (0x3000, 0x9fff), (0xac00, 0xd7a3), (0xf900, 0xfdcf), (0xfe00, 0xfffd), (0x1f300, 0x1faff), (0x10000, 0x1ffff)])
        return chr(rng.randint(low, high))

    while len(texts) < NUM_TEXTS:
        style = rng.random()
        if style < 0.35:  # words, mostly with spaces between
            parts = []
            for _ in range(rng.randint(1, 9)):
                parts += [rng.choice(vocabulary), rng.choice([" "] * 8 + SPACES)]
            text = "".join(parts[: rng.randint(1, len(parts))])
        elif style < 0.75:  # anything next to anything
            text = "".join(rng.choice(rng.choice(pieces)) for _ in range(rng.randint(1, 9)))
        elif style < 0.83:  # a cut out of the training text
            start = rng.randrange(len(TRAINING))
            text = TRAINING[start : start + rng.randint(1, 60)]
        elif style < 0.90:  # bytes, with what is not UTF-8 replaced
            text = rng.randbytes(rng.randint(1, 16)).decode("utf-8", "replace")
        elif style < 0.96:  # any characters
            text = "".join(any_character() for _ in range(rng.randint(1, 10)))
        else:  # a few letters, many ways to merge them
            text = "".join(rng.choice("aabeht n\u00e9") for _ in range(rng.randint(5, 40)))
        if not any(0xd800 <= ord(c) <= 0xdfff for c in text):
            texts.append(text)
    assert all(text.encode("utf-8") for text in texts if text)
    return texts[:NUM_TEXTS]


# --------------------------------------------------------------------------------------------------
# References
# --------------------------------------------------------------------------------------------------


class References:
    def __init__(self, texts):
        self.texts = texts
        self.all = {}

    def add(self, name, kind, library, encode, decode=None, others=None, **notes):
        ids = [list(map(int, encode(text))) for text in self.texts]
        sums = [zlib.crc32(struct.pack(f"<{len(i)}I", *i)) for i in ids]
        (HERE / f"{name}.crc32").write_bytes(struct.pack(f"<{len(sums)}I", *sums))
        entry = {"kind": kind, "library": library, **notes, "ids": ids[:NUM_FULL]}
        if decode:
            trips = [decode(i) == text for i, text in zip(ids, self.texts)]
            bits = sum(trip << number for number, trip in enumerate(trips))
            entry["round_trips"] = bits.to_bytes(len(trips) // 8 + 1, "little").hex()
            notes["round_trips"] = sum(trips)
        for other, other_encode in (others or {}).items():
            count = sum(list(other_encode(text)) != i for text, i in zip(self.texts, ids))
            entry.setdefault("differs", {})[other] = count
        self.all[name] = entry
        print(name, library, notes.get("round_trips"), entry.get("differs"), flush=True)

    def write(self):
        lines = [f"{json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in self.all.items()]
        (HERE / "references.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


class SpmReference:
    """sentencepiece, cut at control symbols."""

    def __init__(self, path, legacy=False):
        self.whole = spm.SentencePieceProcessor(model_file=str(path))
        proto = spm_proto.ModelProto()
        proto.ParseFromString(Path(path).read_bytes())
        proto.normalizer_spec.add_dummy_prefix = False
        self.rest = spm.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.legacy = legacy
        sp = self.whole
        cut = [i for i in range(sp.get_piece_size()) if sp.is_control(i) or sp.is_unknown(i)]
        self.special = {sp.id_to_piece(i): i for i in cut}
        self.pattern = re.compile("(" + "|".join(re.escape(s) for s in sorted(self.special, key=len, reverse=True)) + ")")

    def encode(self, text):
        ids = []
        for number, part in enumerate(self.pattern.split(text)):
            if part in self.special:
                ids.append(self.special[part])
            elif part:
                ids += (self.whole if number == 0 or self.legacy else self.rest).encode(part)
        return ids

    def with_bos(self, text):
        bos = self.whole.bos_id()
        return ([bos] if bos >= 0 else []) + self.encode(text)


class Llama:
    """llama_tokenize of a vocabulary-only GGUF file."""

    def __init__(self, library):
        self.lib = lib = ctypes.CDLL(library)

        class ModelParams(ctypes.Structure):
            _fields_ = MODEL_PARAMS

        lib.llama_model_default_params.restype = ModelParams
        lib.llama_model_load_from_file.restype = ctypes.c_void_p
        lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, ModelParams]
        lib.llama_model_get_vocab.restype = ctypes.c_void_p
        lib.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
        lib.llama_model_free.argtypes = [ctypes.c_void_p]
        lib.llama_tokenize.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]
        lib.llama_detokenize.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_char_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]
        lib.llama_vocab_is_eog.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        lib.llama_vocab_is_eog.restype = ctypes.c_bool
        self.quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        lib.llama_log_set(self.quiet, None)
        lib.llama_backend_init()

    def load(self, path):
        params = self.lib.llama_model_default_params()
        params.vocab_only = True
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, path
        self.vocab = self.lib.llama_model_get_vocab(self.model)

    def free(self):
        self.lib.llama_model_free(self.model)

    def encode(self, text, add_special=False):
        data = text.encode("utf-8")
        buffer = (ctypes.c_int32 * (len(data) + 16))()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), buffer, len(buffer), add_special, True)
        assert count >= 0
        return list(buffer[:count])

    def ends(self, count):
        return [i for i in range(count) if self.lib.llama_vocab_is_eog(self.vocab, i)]


# llama.h's llama_model_params up to the first of its booleans.
MODEL_PARAMS = [
    ("devices", ctypes.c_void_p),
    ("tensor_buft_overrides", ctypes.c_void_p),
    ("n_gpu_layers", ctypes.c_int32),
    ("split_mode", ctypes.c_int32),
    ("load_mode", ctypes.c_int32),
    ("lazy_mode", ctypes.c_int32),
    ("main_gpu", ctypes.c_int32),
    ("tensor_split", ctypes.c_void_p),
    ("progress_callback", ctypes.c_void_p),
    ("progress_callback_user_data", ctypes.c_void_p),
    ("kv_overrides", ctypes.c_void_p),
    ("vocab_only", ctypes.c_bool),
    ("others", ctypes.c_bool * 5),
]


def write_gguf(path, metadata):
    """A GGUF file without tensors."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, size in {"context_length": 128, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64, "attention.head_count": 2}.items():
        writer.add_uint32(f"llama.{key}", size)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif key.endswith("scores"):
            writer.add_array(key, [float(x) for x in value])
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def gguf_references(references, llama, kind, metadata, variants, others=None):
    """`variants`: name to changed metadata. An id list for each, BOS and EOS as the file says."""
    (HERE / kind).mkdir(exist_ok=True)
    (HERE / kind / "metadata.json").write_text(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")))
    for name, change in variants.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocab.gguf"
            write_gguf(path, {**metadata, **change})
            llama.load(path)
            ends = llama.ends(len(metadata["tokenizer.ggml.tokens"]))
            references.add(name, kind, "llama.cpp", lambda text: llama.encode(text, True), add_special_tokens=True, metadata=change, ends=ends, others=(others or {}).get(name))
            llama.free()


# --------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------


def train_spm(kind, **options):
    folder = HERE / kind
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        prefix = Path(scratch) / "m"
        lines = [line for line in TRAINING.split("\n") if line.strip()]
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines * 3), model_prefix=str(prefix), hard_vocab_limit=False, num_threads=1, minloglevel=2,
            input_sentence_size=0, max_sentence_length=100000, **options,
        )
        proto = spm_proto.ModelProto()
        proto.ParseFromString((Path(str(prefix) + ".model")).read_bytes())
        proto.trainer_spec.model_prefix = "m"
        (folder / "tokenizer.model").write_bytes(proto.SerializeToString(deterministic=True))
    return folder / "tokenizer.model"


def byte_level_json(kind, pre_tokenizer, specials, vocab_size, ignore_merges=False, bos=None):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False, min_frequency=2)
    tokenizer.train_from_iterator([TRAINING] * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    folder = HERE / kind
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    return tokenizer


def byte_level_metadata(tokenizer, pre, bos, eos, control):
    data = json.loads(tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    added = {token["content"] for token in data["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": [(3 if token in control else 4) if token in added else 1 for token, _ in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in data["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.token_to_id(bos),
        "tokenizer.ggml.eos_token_id": tokenizer.token_to_id(eos),
    }


def spm_metadata(path):
    sp = spm.SentencePieceProcessor(model_file=str(path))
    def kind(i):
        if sp.is_unknown(i): return 2
        if sp.is_control(i): return 3
        if sp.is_byte(i): return 6
        return 5 if sp.is_unused(i) else 1
    count = sp.get_piece_size()
    types = [4 if sp.id_to_piece(i) in ("<user>", "<tool>") else kind(i) for i in range(count)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in range(count)],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in range(count)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": sp.bos_id(),
        "tokenizer.ggml.eos_token_id": sp.eos_id(),
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
    }


def transformers_llama(folder, **options):
    from transformers import LlamaTokenizer

    return LlamaTokenizer.from_pretrained(str(folder), **options)


def spm_kinds(references, llama):
    reference_kinds = {
        "spm_unigram": dict(model_type="unigram", vocab_size=700, byte_fallback=True, character_coverage=0.98, normalization_rule_name="nmt_nfkc", user_defined_symbols=["<user>", "\u2581\u2581"]),
        "spm_unigram_unk": dict(model_type="unigram", vocab_size=500, character_coverage=0.98, normalization_rule_name="identity", bos_id=-1, treat_whitespace_as_suffix=True),
        "spm_bpe": dict(model_type="bpe", vocab_size=800, byte_fallback=True, character_coverage=0.99, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True),
        "spm_bpe_no_prefix": dict(model_type="bpe", vocab_size=700, byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, split_by_whitespace=False, user_defined_symbols=["<user>", "\u2581\u2581", "\u2581\u2581\u2581", "\n", "\n\n"], control_symbols=["<start_of_turn>"], pad_id=3),
    }
    for kind, options in reference_kinds.items():
        path = train_spm(kind, **options)
        reference = SpmReference(path)
        others = {}
        if kind == "spm_bpe":
            hf = transformers_llama(path.parent, legacy=False)
            others["transformers LlamaTokenizer(legacy=False)"] = lambda text: [1] + hf.encode(text, add_special_tokens=False)
        references.add(kind, kind, "sentencepiece", reference.with_bos, decode=lambda ids, sp=reference.whole: sp.decode(ids), add_special_tokens=True, others=others)
    # Equal scores and pieces that are unused: what training does not give.
    proto = spm_proto.ModelProto()
    proto.ParseFromString((HERE / "spm_bpe" / "tokenizer.model").read_bytes())
    rng = random.Random(7)
    for piece in proto.pieces:
        if piece.type == 1 and len(piece.piece) > 1:
            piece.score = float(-rng.randint(1, 40))
            if rng.random() < 0.1:
                piece.type = 5
    (HERE / "spm_bpe_ties").mkdir(exist_ok=True)
    path = HERE / "spm_bpe_ties" / "tokenizer.model"
    path.write_bytes(proto.SerializeToString(deterministic=True))
    references.add("spm_bpe_ties", "spm_bpe_ties", "sentencepiece", SpmReference(path).encode, add_special_tokens=False)
    legacy = SpmReference(HERE / "spm_bpe" / "tokenizer.model", legacy=True)
    references.add("spm_bpe_legacy", "spm_bpe", "sentencepiece", legacy.encode, add_special_tokens=False, legacy=True)

    metadata = spm_metadata(HERE / "spm_bpe" / "tokenizer.model")
    hf = transformers_llama(HERE / "spm_bpe", legacy=True)
    variants = {"gguf_spm": {}, "gguf_spm_no_prefix": {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}}
    others = {"gguf_spm": {"sentencepiece, legacy": lambda text: [1] + legacy.encode(text), "transformers LlamaTokenizer(legacy=True)": lambda text: [1] + hf.encode(text, add_special_tokens=False)}}
    gguf_references(references, llama, "gguf_spm", metadata, variants, others)
    # User-defined runs of spaces and line feeds, as Gemma has; ties.
    metadata = spm_metadata(path)
    tokens = metadata["tokenizer.ggml.tokens"]
    for text, kind in [("  ", 4), ("    ", 4), ("\n\n", 4), ("<tool>", 4), ("<start_of_turn>", 3), ("<end_of_turn>", 1)]:
        tokens.append(text)
        metadata["tokenizer.ggml.scores"].append(-1000.0)
        metadata["tokenizer.ggml.token_type"].append(kind)
    gguf_references(references, llama, "gguf_spm_ties", metadata, {"gguf_spm_ties": {}})


def byte_level_kinds(references, llama):
    def split(pattern):
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    falcon = pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True), pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated", invert=False)])
    llama3_specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"]
    qwen_specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = {
        "json_llama3": byte_level_json("json_llama3", split(LLAMA3), llama3_specials, 900, True, "<|begin_of_text|>"),
        "json_qwen2": byte_level_json("json_qwen2", split(QWEN2), qwen_specials, 800),
        "json_falcon": byte_level_json("json_falcon", falcon, ["<|endoftext|>"], 700),
    }
    for name, tokenizer in made.items():
        references.add(name, name, "tokenizers", lambda text: tokenizer.encode(text).ids, decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True), add_special_tokens=True)

    def hf(name):
        return {"tokenizers": lambda text: made[name].encode(text).ids}

    # One vocabulary under every pre-tokenizer.
    metadata = byte_level_metadata(made["json_llama3"], "llama-bpe", "<|begin_of_text|>", "<|end_of_text|>", llama3_specials)
    variants = {f"gguf_pre_{pre}": {"tokenizer.ggml.pre": pre} for pre in PRE_TYPES}
    gguf_references(references, llama, "gguf_llama3", metadata, variants, {"gguf_pre_llama-bpe": hf("json_llama3")})
    metadata = byte_level_metadata(made["json_qwen2"], "qwen2", "<|endoftext|>", "<|im_end|>", qwen_specials)
    gguf_references(references, llama, "gguf_qwen2", metadata, {"gguf_qwen2": {}}, {"gguf_qwen2": hf("json_qwen2")})
    metadata = byte_level_metadata(made["json_falcon"], "falcon", "<|endoftext|>", "<|endoftext|>", ["<|endoftext|>"])
    gguf_references(references, llama, "gguf_falcon", metadata, {"gguf_falcon": {}}, {"gguf_falcon": hf("json_falcon")})
    return made


def tiktoken_kind(references):
    """Llama 3's form, with a vocabulary of tiktoken's own small trainer."""
    from tiktoken._educational import bpe_train

    ranks = bpe_train(TRAINING, 256 + 400, LLAMA3, visualise=None)
    folder = HERE / "tiktoken"
    folder.mkdir(exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in sorted(ranks.items(), key=lambda item: item[1])]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"]
    names += [f"<|reserved_special_token_{2 + i}|>" for i in range(256 - len(names))]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens=special)
    bos = special["<|begin_of_text|>"]

    def decode(ids):
        return encoding.decode([i for i in ids if i < len(ranks)])

    from transformers.convert_slow_tokenizer import TikTokenConverter

    hf = TikTokenConverter(str(folder / "tokenizer.model"), pattern=LLAMA3, extra_special_tokens=names).converted()
    others = {"transformers TikTokenConverter": lambda text: [bos] + hf.encode(text).ids}
    references.add("tiktoken", "tiktoken", "tiktoken", lambda text: [bos] + encoding.encode(text, allowed_special="all"), decode=decode, add_special_tokens=True, others=others)


def main():
    library = sys.argv[1]
    texts = make_texts()
    (HERE / "texts.jsonl").write_text("".join(json.dumps(text, ensure_ascii=True) + "\n" for text in texts))
    references = References(texts)
    llama = Llama(library)
    spm_kinds(references, llama)
    byte_level_kinds(references, llama)
    tiktoken_kind(references)
    references.write()


if __name__ == "__main__":
    main()
