#!/usr/bin/env python3
"""HF transformers' continuous batching on a GPU, for tests/gpu.sh: generated tokens a second.

    python3 benches/transformers_gpu.py MODEL_DIR PROMPTS.jsonl NEW_TOKENS

All prompts (prompt_token_ids) at once, greedy, no end token; the best of two rounds after one that
warms up. Of the attention implementations the first one that this installation can run is taken.
Exit code 3: there is no torch that sees a GPU, no transformers, or one without generate_batch.
"""

import json
import sys
import time

ATTENTIONS = ("flash_attention_2", "sdpa", "sdpa_paged", "eager")
ROUNDS = 3


def absent(why):
    print(f"absent {why}")
    sys.exit(3)


try:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig
except ImportError as error:
    absent(error)
if not torch.cuda.is_available():
    absent("torch sees no GPU")


def generated(outputs):
    """Tokens of all answers; their field's name has changed from version to version."""
    count = 0
    for output in outputs.values():
        count += len(getattr(output, "generated_tokens", None) or output.static_outputs)
    return count


def load(folder, attention):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map="cuda", attn_implementation=attention
    ).eval()


def rate(model, prompts, new_tokens):
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
    )
    best = 0.0
    for number in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        outputs = model.generate_batch(inputs=prompts, generation_config=config)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if number > 0:
            best = max(best, generated(outputs) / seconds)
    return best


def main():
    folder, file, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with open(file) as lines:
        prompts = [json.loads(line)["prompt_token_ids"] for line in lines]
    reasons = []
    for attention in ATTENTIONS:
        model = None
        try:
            model = load(folder, attention)
            if not hasattr(model, "generate_batch"):
                absent(f"transformers {transformers.__version__} has no generate_batch")
            best = rate(model, prompts, new_tokens)
        except (ImportError, ValueError, RuntimeError, TypeError) as error:
            reasons.append(f"{attention}: {str(error).splitlines()[0] if str(error) else type(error)}")
            del model
            torch.cuda.empty_cache()
            continue
        print(f"attention {attention}")
        print(f"version transformers-{transformers.__version__}-torch-{torch.__version__}")
        print(f"generated_tokens_per_second {best:.1f}")
        return
    absent("; ".join(reasons))


main()
