#!/usr/bin/env python3
"""LoRA fine-tuning with PEFT and torch: rank 16 on all linear layers, AdamW, clipping; prints the loss and tokens/s
of each step. benches/finetune.sh runs it beside farm and candle.

    pip install torch transformers peft
    python benches/peft_finetune.py MODEL TRAIN.jsonl [--dtype f32|bf16] [--checkpointing] [--threads 2]

Records are {"text": ...} of at least --length tokens and are cut there, so nothing is padded. The base computes in
its type; the adapter is f32, as PEFT has it.
"""

import argparse
import itertools
import json
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("train")
    p.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    p.add_argument("--checkpointing", action="store_true", help="recompute each layer in the backward pass")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=512)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{args.model}/tokenizer.json")
    with open(args.train) as lines:
        records = [tokenizer(json.loads(line)["text"])["input_ids"][:args.length] for line in lines]
    assert all(len(ids) == args.length for ids in records)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    model = get_peft_model(model, LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")).train()
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)

    batches = itertools.cycle(records[i:i + args.batch] for i in range(0, len(records), args.batch))
    for step, batch in zip(range(args.steps), batches):
        start = time.perf_counter()
        ids = torch.tensor(batch)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate = ids.numel() / (time.perf_counter() - start)
        print(f"step {step} loss {loss.item():.4f} tokens/s {rate:.1f}", flush=True)


main()
