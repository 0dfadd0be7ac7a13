#!/usr/bin/env python3
"""farm and llama.cpp over the same GGUF files, one after the other: tokens a second.

    cargo build --release
    python benches/llama_cpp.py [--threads N] [--pairs N] FARM LLAMA_BATCHED_BENCH FILE.gguf...

Both generate texts of two lengths and the difference is timed, so that loading, tokenizing and starting do not count:
batches of 1, 8 and 32 sequences (decode), and one prompt of two lengths (prefill). Prints the medians of the pairs by the
clock, and by processor time, which other work on the machine disturbs less. The files' vocabulary must have single
letters (any real one has); the weights may be random.
"""

import argparse
import json
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

# Name, sequences, and (prompt tokens, new tokens) of the short and of the long run.
CASES = [
    ("decode, batch 1", 1, (16, 4), (16, 68)),
    ("decode, batch 8", 8, (16, 4), (16, 36)),
    ("decode, batch 32", 32, (16, 2), (16, 18)),
    ("prefill", 1, (16, 2), (528, 2)),
]


def seconds(command):
    """By the clock, and of processor time."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return clock, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def farm(args, model, batch, prompt, new, activations):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        letters = ["".join(chr(97 + (i * 7 + j * 11) % 26) for j in range(prompt - 1)) for i in range(batch)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in letters))
        return seconds([
            args.farm, "--model", model, "--prompts-file", folder / "prompts.jsonl", "--output", folder / "out.jsonl",
            "--run-dir", folder / "run", "--no-stage", "--threads", args.threads, "--max-new-tokens", new, "--ignore-eos",
            "--max-batch-size", batch, "--max-seq-len", "1024", "--activations", activations, "--quiet",
        ])


def llama_cpp(args, model, batch, prompt, new, _):
    context = max(2048, batch * (prompt + new) + 64)
    return seconds([
        args.llama, "-m", model, "-c", context, "-t", args.threads, "-tb", args.threads, "-npp", prompt, "-ntg", new,
        "-npl", batch, "-ngl", "0",
    ])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("farm")
    parser.add_argument("llama")
    parser.add_argument("models", nargs="+")
    args = parser.parse_args()
    engines = [("farm", farm, "rounded"), ("farm, f32 activations", farm, "f32"), ("llama.cpp", llama_cpp, None)]
    for model in args.models:
        print(Path(model).name)
        for what, batch, short, long in CASES:
            tokens = batch * (sum(long) - sum(short))
            rates = {name: [] for name, _, _ in engines}
            for _ in range(args.pairs):
                for name, run, activations in engines:
                    few = run(args, model, batch, *short, activations)
                    many = run(args, model, batch, *long, activations)
                    rates[name].append([tokens / (m - f) for m, f in zip(many, few, strict=True)])
            for name, found in rates.items():
                clock, processor = (statistics.median(rate) for rate in zip(*found, strict=True))
                print(f"  {what:16} {name:22} {clock:8.1f} tokens/s   {processor:8.1f} a processor second", flush=True)


if __name__ == "__main__":
    main()
