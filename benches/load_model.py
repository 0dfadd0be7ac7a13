"""Writes a random Llama of about half a billion parameters, for benches/load.sh.

    load_model.py DIR FORM [LAYERS]     FORM: safetensors, gguf-f16, gguf-q8_0

Values are small and repeat; what they say does not matter. The GGUF file has no vocabulary:
give a tokenizer by --tokenizer. Plain Python, no packages.
"""

import json
import os
import random
import struct
import sys

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB, CONTEXT = 2048, 5632, 32, 8, 32000, 2048
HEAD_DIM = HIDDEN // HEADS
# ggml's numbers of types, and bytes of a block of 32 values.
GGML = {"f32": (0, 128), "f16": (1, 64), "q8_0": (8, 34)}


def tensors(layers):
    """(name in Hugging Face's form, name in GGUF, shape) of all tensors."""
    yield "model.embed_tokens", "token_embd", [VOCAB, HIDDEN]
    for i in range(layers):
        hf, gguf = f"model.layers.{i}.", f"blk.{i}."
        for name, other, shape in [
            ("input_layernorm", "attn_norm", [HIDDEN]),
            ("self_attn.q_proj", "attn_q", [HIDDEN, HIDDEN]),
            ("self_attn.k_proj", "attn_k", [KV_HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.v_proj", "attn_v", [KV_HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.o_proj", "attn_output", [HIDDEN, HIDDEN]),
            ("post_attention_layernorm", "ffn_norm", [HIDDEN]),
            ("mlp.gate_proj", "ffn_gate", [INTERMEDIATE, HIDDEN]),
            ("mlp.up_proj", "ffn_up", [INTERMEDIATE, HIDDEN]),
            ("mlp.down_proj", "ffn_down", [HIDDEN, INTERMEDIATE]),
        ]:
            yield hf + name, gguf + other, shape
    yield "model.norm", "output_norm", [HIDDEN]
    yield "lm_head", "output", [VOCAB, HIDDEN]


def values(shape):
    n = 1
    for length in shape:
        n *= length
    return n


def blocks(dtype, rng):
    """A megabyte or so of whole blocks of small values."""
    low = rng.randbytes(1 << 20)
    if dtype == "q8_0":
        return b"".join(struct.pack("<e", 2e-4) + low[i : i + 32] for i in range(0, 1 << 20, 32))
    top = {"bf16": (0x3C, 0xBC), "f16": (0x20, 0xA0)}[dtype]
    return b"".join(bytes((byte, top[byte & 1])) for byte in low[: 1 << 19])


def write_values(file, dtype, num_bytes, block):
    if dtype == "f32":
        file.write(struct.pack("<f", 1.0) * (num_bytes // 4))
        return
    while num_bytes > 0:
        num_bytes -= file.write(block[:num_bytes])


def safetensors(folder, layers, rng):
    header, at = {}, 0
    for name, _, shape in tensors(layers):
        end = at + 2 * values(shape)
        header[name + ".weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = blocks("bf16", rng)
    with open(os.path.join(folder, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, shape in tensors(layers):
            write_values(file, "bf16", 2 * values(shape), block)
    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": 2,
    }
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file)


def text(s):
    return struct.pack("<Q", len(s)) + s.encode()


def gguf(folder, layers, rng, dtype):
    pairs = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    numbers = {
        "block_count": layers, "context_length": CONTEXT, "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE, "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS, "vocab_size": VOCAB,
        "rope.dimension_count": HEAD_DIM,
    }
    for key, number in numbers.items():
        pairs += text("llama." + key) + struct.pack("<II", 4, number)
    pairs += text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5)
    table, at, sizes = b"", 0, []
    for _, name, shape in tensors(layers):
        kind = "f32" if len(shape) == 1 else dtype
        number, block_bytes = GGML[kind]
        size = values(shape) // 32 * block_bytes
        table += text(name + ".weight") + struct.pack("<I", len(shape))
        table += b"".join(struct.pack("<Q", n) for n in reversed(shape))
        table += struct.pack("<IQ", number, at)
        sizes.append((kind, size))
        at += size + -size % 32
    header = b"GGUF" + struct.pack("<IQQ", 3, len(sizes), len(numbers) + 2) + pairs + table
    block = blocks(dtype, rng)
    with open(os.path.join(folder, "model.gguf"), "wb") as file:
        file.write(header + b"\0" * (-len(header) % 32))
        for kind, size in sizes:
            write_values(file, kind, size, block)
            file.write(b"\0" * (-size % 32))


def main():
    folder, form = sys.argv[1:3]
    layers = int(sys.argv[3]) if len(sys.argv) > 3 else 8
    os.makedirs(folder, exist_ok=True)
    rng = random.Random(1)
    if form == "safetensors":
        safetensors(folder, layers, rng)
    else:
        gguf(folder, layers, rng, form.removeprefix("gguf-"))


main()
