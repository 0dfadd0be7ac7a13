#!/usr/bin/env python3
"""Random weights of TinyLlama's shape (1.1 billion parameters) as Q4_K_M and Q8_0 GGUF files, for benches/llama_cpp.py.

    python benches/random_gguf.py FOLDER

Needs the gguf and numpy packages. The mixture of types is that of llama.cpp's own Q4_K_M; scales are such that
activations stay small. Tokens are bytes, and numbers up to the vocabulary's 32,000.
"""

import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB = 2048, 5632, 22, 32, 4, 32000
# Values and bytes of a block, and where its f16 scales stand.
BLOCKS = {
    Type.Q4_K: (256, 144, {0: 1e-4, 2: 7.5e-4}),
    Type.Q6_K: (256, 210, {208: 1.5e-5}),
    Type.Q8_0: (32, 34, {0: 3e-4}),
}


def matrix(random, rows, cols, kind):
    values, size, scales = BLOCKS[kind]
    blocks = np.frombuffer(random.bytes(rows * cols // values * size), dtype=np.uint8).reshape(-1, size).copy()
    for at, scale in scales.items():
        blocks[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), dtype=np.uint8)
    return blocks.reshape(rows, cols // values * size)


def vocabulary(file):
    tokens = [b"<unk>", b"<s>", b"</s>"] + [b"<0x%02X>" % byte for byte in range(256)]
    numbers = VOCAB - len(tokens)
    file.add_tokenizer_model("llama")
    file.add_token_list(tokens + [f"\u2581w{i}".encode() for i in range(numbers)])
    file.add_token_scores([0.0] * len(tokens) + [-float(i) for i in range(numbers)])
    file.add_token_types([2, 3, 3] + [6] * 256 + [1] * numbers)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_add_bos_token(True)


def write(path, base, of_more_bits, output):
    """`base` for most matrices, `of_more_bits` for those that Q4_K_M gives more."""
    random, file = np.random.default_rng(1), GGUFWriter(path, "llama")
    file.add_context_length(4096)
    file.add_embedding_length(HIDDEN)
    file.add_block_count(LAYERS)
    file.add_feed_forward_length(INTERMEDIATE)
    file.add_head_count(HEADS)
    file.add_head_count_kv(KV_HEADS)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(10000.0)
    file.add_rope_dimension_count(HIDDEN // HEADS)
    file.add_vocab_size(VOCAB)
    vocabulary(file)

    def add(name, rows, cols, kind):
        file.add_tensor(f"{name}.weight", matrix(random, rows, cols, kind), raw_dtype=kind)

    def norm(name):
        file.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))

    add("token_embd", VOCAB, HIDDEN, base)
    add("output", VOCAB, HIDDEN, output)
    norm("output_norm")
    for layer in range(LAYERS):
        eighth = LAYERS // 8
        has_more = layer < eighth or layer >= 7 * LAYERS // 8 or (layer - eighth) % 3 == 2
        more = of_more_bits if has_more else base
        norm(f"blk.{layer}.attn_norm")
        norm(f"blk.{layer}.ffn_norm")
        add(f"blk.{layer}.attn_q", HIDDEN, HIDDEN, base)
        add(f"blk.{layer}.attn_k", KV_HEADS * HIDDEN // HEADS, HIDDEN, base)
        add(f"blk.{layer}.attn_v", KV_HEADS * HIDDEN // HEADS, HIDDEN, more)
        add(f"blk.{layer}.attn_output", HIDDEN, HIDDEN, base)
        add(f"blk.{layer}.ffn_gate", INTERMEDIATE, HIDDEN, base)
        add(f"blk.{layer}.ffn_up", INTERMEDIATE, HIDDEN, base)
        add(f"blk.{layer}.ffn_down", HIDDEN, INTERMEDIATE, more)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "1.1b-q4_k_m.gguf", Type.Q4_K, Type.Q6_K, Type.Q6_K)
    write(folder / "1.1b-q8_0.gguf", Type.Q8_0, Type.Q8_0, Type.Q8_0)
