#!/usr/bin/env python3
"""HF transformers over the weights of `cargo bench --bench decode`: prefill and
greedy decode tokens/s with a static batch, 128 prompt tokens, 64 new ones.

    pip install torch transformers
    python benches/transformers_decode.py target/bench-models/110m-bf16 [THREADS]

Batches are of equal length, so nothing is padded: the best case for it. The weights
are computed with in their own type.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM

PROMPT, NEW, ROUNDS = 128, 64, 3


def run(model, batch):
    ids = torch.tensor(
        [[(i + s * 31) * 7919 % 31_000 + 10 for i in range(PROMPT)] for s in range(batch)]
    )
    start = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - start
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(NEW - 1):
        out = model(token, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    decode = time.perf_counter() - start
    return batch * PROMPT / prefill, batch * (NEW - 1) / decode


def main():
    path = sys.argv[1]
    torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else torch.get_num_threads())
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    print(f"{path}: {model.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("batch  prefill tok/s  decode tok/s")
    with torch.inference_mode():
        for batch in (1, 4, 16, 32):
            rounds = [run(model, batch) for _ in range(ROUNDS)]
            print(f"{batch:>5}  {max(r[0] for r in rounds):>13.0f}  {max(r[1] for r in rounds):>12.1f}")


main()
