#!/usr/bin/env python3
"""A real model, Gemma 3 270M in Q4_K_M, through farm and through transformers on the same values.

    cargo build --release && cargo build --example texts
    python tests/real/model.py FARM TEXTS FOLDER

FOLDER is that of check.py. transformers widens the file's blocks to f32, which is what farm multiplies too with
`--activations f32` (llama.cpp rounds activations to 8 bits, as farm does by default, and leaves the greedy path at near ties). Prints a row a prompt.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from packages import gemma3_270m
from transformers import AutoModelForCausalLM

PROMPTS = ["The capital of France is", "Once upon a time there was a little girl who", "def fibonacci(n):\n    ",
           "Die Schweiz liegt in", "1, 2, 3, 4, 5,", "The three laws of thermodynamics are:\n1."]
NUM_NEW = 32


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


def run(farm, command, model, records):
    with tempfile.TemporaryDirectory() as folder:
        prompts, output = Path(folder) / "p.jsonl", Path(folder) / "o.jsonl"
        prompts.write_text(lines(records))
        generate = ["--max-new-tokens", str(NUM_NEW), "--ignore-eos", "--return-token-ids"] if command == "generate" else []
        subprocess.run([farm, command, "--model", model, "--prompts-file", prompts, "--output", output, "--no-stage", "--max-seq-len", "512", "--activations", "f32", *generate], check=True, stderr=subprocess.DEVNULL)
        return [json.loads(line) for line in output.read_text().splitlines()]


if __name__ == "__main__":
    farm, texts, folder = sys.argv[1:]
    path = gemma3_270m(folder)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    answers = run(farm, "generate", path, [{"prompt": prompt} for prompt in PROMPTS])
    whole = [prompt + answer["text"] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    scores = run(farm, "score", path, [{"prompt": text} for text in whole])
    encoded = subprocess.run([texts, "encode", path], input=lines(PROMPTS + whole), capture_output=True, text=True, check=True).stdout
    ids = [torch.tensor([json.loads(line)["ids"]]) for line in encoded.splitlines()]
    for prompt, answer, score, start, text in zip(PROMPTS, answers, scores, ids, ids[len(PROMPTS):], strict=False):
        with torch.no_grad():
            logprobs = model(text).logits[0].double().log_softmax(-1)
            greedy = model.generate(start, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None)[0].tolist()[-NUM_NEW:]
        want = logprobs[:-1].gather(1, text[0, 1:, None])[:, 0]
        got = torch.tensor([value for value in score["score"]["token_logprobs"] if value is not None]).double()
        print(f"{prompt!r}: greedy ids {'equal' if greedy == answer['token_ids'] else 'DIFFER'}; log-probabilities within {(want - got).abs().max():.1e}; "
              f"perplexity {score['score']['perplexity']:.6f}, there {math.exp(-want.mean()):.6f}")
