#!/usr/bin/env python3
"""Writes ggml.safetensors: what ggml makes of small f32 rows in every block-quantized type.

    python tests/golden/quant/generate.py path/to/libggml-base.so

The library is that of a llama.cpp build (the committed output: ggml 0.25.3, x86-64, GCC). Packages: numpy,
safetensors, gguf (its quantizer of q8_0 is held against the library's).

    input           f32 [12, 256]: rows of several distributions, see rows()
    TYPE.blocks     u8: input quantized by ggml_quantize_chunk without an importance matrix,
                    then 1024 values' worth of random blocks with finite scales
    TYPE.values     f32: dequantize_row_TYPE of those blocks
"""

import ctypes
import pathlib
import sys

import gguf
import numpy as np
from safetensors.numpy import save_file

# name: ggml's number, values and bytes of a block, offsets of its f16 fields
TYPES = {
    "q4_0": (2, 32, 18, [0]),
    "q4_1": (3, 32, 20, [0, 2]),
    "q5_0": (6, 32, 22, [0]),
    "q5_1": (7, 32, 24, [0, 2]),
    "q8_0": (8, 32, 34, [0]),
    "q2_k": (10, 256, 84, [80, 82]),
    "q3_k": (11, 256, 110, [108]),
    "q4_k": (12, 256, 144, [0, 2]),
    "q5_k": (13, 256, 176, [0, 2]),
    "q6_k": (14, 256, 210, [208]),
}
COLS = 256
RANDOM_VALUES = 1024


def rows(rng):
    """Rows that reach the branches of the quantizers."""
    normal = rng.standard_normal((12, COLS)).astype(np.float32)
    normal[1] *= 0.02
    normal[2] = np.abs(normal[2])  # minimum clipped to 0
    normal[3] = -np.abs(normal[3])
    normal[4, ::37] *= 50.0  # outliers
    normal[5, :128] = 0.0  # groups of zeros
    normal[6] = 0.0
    normal[7] = 0.125  # constants
    normal[8] *= 1e-7  # scales below f16's normal range
    normal[9] *= 1e-17  # below ggml's threshold for a group
    normal[10] = np.linspace(-1, 1, COLS, dtype=np.float32)
    normal[11] *= 1e4
    return normal


def random_blocks(rng, values, size, halves):
    blocks = rng.integers(0, 256, (RANDOM_VALUES // values, size), dtype=np.uint8)
    for at in halves:
        scale = rng.standard_normal(len(blocks)).astype(np.float16)
        scale[-1] = np.float16(-3e-7)  # subnormal
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(-1)


def main():
    ggml = ctypes.CDLL(sys.argv[1])
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [
        ctypes.c_void_p
    ]
    rng = np.random.default_rng(20240607)
    x = rows(rng)
    tensors = {"input": x}
    for name, (number, values, size, halves) in TYPES.items():
        quantized = np.zeros(x.size // values * size, dtype=np.uint8)
        written = ggml.ggml_quantize_chunk(number, x.ctypes.data, quantized.ctypes.data, 0, len(x), COLS, None)
        assert written == quantized.size
        if name == "q8_0":
            python = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
            assert np.array_equal(python.reshape(-1), quantized)
        blocks = np.concatenate([quantized, random_blocks(rng, values, size, halves)])
        out = np.zeros(blocks.size // size * values, dtype=np.float32)
        dequantize = getattr(ggml, "dequantize_row_" + name.replace("_k", "_K"))
        dequantize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        dequantize.restype = None
        dequantize(blocks.ctypes.data, out.ctypes.data, out.size)
        tensors[f"{name}.blocks"] = blocks
        tensors[f"{name}.values"] = out
    save_file(tensors, pathlib.Path(__file__).parent / "ggml.safetensors")


if __name__ == "__main__":
    main()
