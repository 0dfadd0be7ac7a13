#!/usr/bin/env python3
"""Trains small LoRA adapters for the models in this folder with PEFT and torch, and writes down every step.

    python tests/golden/finetune.py [CASE...]

The committed output was made with peft 0.21.2 and the versions named in generate.py. Each folder in finetune/ holds

    start/, end/     the adapter before and after, as PEFT saves it (adapter_config.json, adapter_model.safetensors)
    case.json
      model          the folder (or the GGUF file) beside this script that is adapted; it is frozen, computed in f32
      notes          what is special about the case
      lora           the arguments of PEFT's LoraConfig; dropout is 0
      training       learning_rate, schedule, warmup_steps, weight_decay, max_grad_norm, micro_batch_size,
                     loraplus_lr_ratio; AdamW with betas 0.9 and 0.999 and eps 1e-8, all trained tensors decayed
      examples[]     token_ids, and is_target: 1 where a token is predicted and counted (never the first)
      steps[]        for each optimiser step its sequences, each a list of numbers of examples: more than one where
                     they are packed (attention stays inside an example, positions restart)
      expected       for each step: loss (of all targets of the step, before the update), grad_norm (before it is
                     clipped), learning_rate, targets (their count); final_loss: of all examples, by the last adapter
      deviation      how far the same run in f64, one sequence at a time, ends from this one: the largest relative
                     difference of a loss, of a gradient's norm, and (as |a - b| / |b| of a tensor) of the adapter

A step's loss is the sum over its targets divided by their count in the whole step, whatever the micro-batches. The
learning rate of step s is that of transformers' schedule after s steps of it: with a warm-up the first is zero.
"""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import generate

HERE = Path(__file__).resolve().parent
STEPS = 20
QV = ["q_proj", "v_proj"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FALCON = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
PHI = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]

# name: (base, LoraConfig, training, notes). What training leaves out is in DEFAULTS.
CASES = {
    "lora_qv": ("llama_gqa", dict(r=4, lora_alpha=8, target_modules=QV), dict(schedule="constant"),
                "Plain LoRA on q and v."),
    "lora_all": ("llama_gqa", dict(r=4, lora_alpha=8, target_modules="all-linear"), dict(warmup_steps=4),
                 "LoRA on all linear layers; linear decay after 4 steps of warm-up."),
    "random_b": ("llama_gqa", dict(r=3, lora_alpha=6, target_modules=LLAMA), dict(start="random", schedule="constant"),
                 "Goes on from an adapter whose B is not zero; an odd rank."),
    "packing": ("llama_gqa", dict(r=4, lora_alpha=8, target_modules=LLAMA), dict(packing=96, batch_size=3),
                "Up to four examples in a sequence; torch gets a block-diagonal mask and restarting positions."),
    "masking": ("llama_gqa", dict(r=4, lora_alpha=8, target_modules=LLAMA), dict(masked=True, warmup_steps=3),
                "Only completions count, of very different lengths."),
    "accumulation": ("llama_gqa", dict(r=4, lora_alpha=8, target_modules=LLAMA),
                     dict(masked=True, batch_size=7, micro_batch_size=2, schedule="cosine", warmup_steps=2,
                          max_grad_norm=3.0),
                     "Seven sequences a step in micro-batches of two: normalised by the targets of the whole step."),
    "packing_accumulation": ("llama_gqa", dict(r=4, lora_alpha=8, target_modules=LLAMA),
                             dict(masked=True, packing=80, batch_size=4, micro_batch_size=1, max_grad_norm=0.3),
                             "Packed sequences one by one, only completions count, the norm clipped at every step."),
    "rslora": ("llama_gqa", dict(r=8, lora_alpha=4, use_rslora=True, target_modules=QV + ["down_proj"]),
               dict(schedule="cosine"),
               "Scaled by alpha / sqrt(r)."),
    "dora": ("llama_gqa", dict(r=4, lora_alpha=8, use_dora=True, target_modules=LLAMA), dict(warmup_steps=2),
             "DoRA: the magnitudes are trained too; the norm of W + s B A is a constant to the gradient."),
    "dora_random_b": ("llama_bias", dict(r=4, lora_alpha=8, use_dora=True, target_modules=LLAMA),
                      dict(start="random", weight_decay=0.1),
                      "DoRA on layers with biases (which are not scaled), from a B that is not zero."),
    "loraplus": ("llama_gqa", dict(r=4, lora_alpha=8, target_modules=LLAMA),
                 dict(loraplus_lr_ratio=4.0, learning_rate=5e-3, weight_decay=0.05),
                 "LoRA+: B learns at four times the rate of A."),
    "weight_decay": ("llama_gqa", dict(r=4, lora_alpha=8, target_modules=QV), dict(start="random", weight_decay=0.5),
                     "Decoupled weight decay, strong enough to be seen."),
    "layers": ("llama_tied", dict(r=4, lora_alpha=8, target_modules=QV + ["up_proj"], layers_to_transform=[0, 2]),
               dict(max_grad_norm=100.0), "Layers 0 and 2 of three are adapted; tied embeddings; nothing is clipped."),
    "lm_head": ("llama_gqa", dict(r=4, lora_alpha=8, target_modules=["o_proj", "lm_head"]), dict(),
                "LoRA on lm_head too."),
    "saved_lm_head": ("llama_gqa", dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
                      dict(learning_rate=5e-3), "lm_head is trained as a whole."),
    "saved_embedding": ("llama_gqa",
                        dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
                        dict(learning_rate=5e-3), "The embedding is trained as a whole; the output is not tied to it."),
    "bf16": ("llama_bf16", dict(r=4, lora_alpha=8, target_modules=LLAMA), dict(),
             "A base stored in bf16, computed in f32."),
    "quantized": ("gguf/llama_quantized_q4_k_m.gguf", dict(r=2, lora_alpha=4, target_modules=QV), dict(),
                  "A base in Q4_K and Q6_K; torch has its weights dequantized by the gguf package."),
    "mistral": ("mistral", dict(r=4, lora_alpha=8, target_modules=r".*\.layers\.1\..*\.(q_proj|v_proj|up_proj)"), dict(),
                "A window of 16 tokens; targets by a regular expression, which PEFT matches to the whole name."),
    "qwen2": ("qwen2", dict(r=4, lora_alpha=8, target_modules=LLAMA), dict(), "Biases on q, k and v."),
    "qwen3": ("qwen3", dict(r=4, lora_alpha=8, target_modules=LLAMA), dict(), "Norms over the heads of q and k; tied."),
    "phi3": ("phi3", dict(r=4, lora_alpha=8, target_modules=PHI), dict(),
             "Fused qkv_proj and gate_up_proj: one A for all their parts; a window of 16."),
    "gemma2": ("gemma2", dict(r=4, lora_alpha=8, target_modules=LLAMA), dict(),
               "Soft-capped scores and logits, norms before and after, a window in layer 0, scaled embeddings; tied."),
    "gemma3": ("gemma3", dict(r=2, lora_alpha=4, target_modules=QV + ["k_proj"]), dict(),
               "Norms over the heads of q and k, two bases of rotation, windows."),
    "falcon_7b": ("falcon_7b", dict(r=4, lora_alpha=8, target_modules=FALCON), dict(),
                  "Parallel attention and MLP behind one LayerNorm, one KV head, fused query_key_value; tied."),
    "falcon_40b": ("falcon_40b", dict(r=2, lora_alpha=4, target_modules=["query_key_value"]), dict(),
                   "Two LayerNorms in parallel, query_key_value by groups of heads."),
    "falcon_rw": ("falcon_rw", dict(r=2, lora_alpha=4, target_modules=FALCON), dict(),
                  "ALiBi, biases, LayerNorms one after the other, query_key_value head by head."),
}
DEFAULTS = dict(learning_rate=1e-2, schedule="linear", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
                batch_size=4, micro_batch_size=None, loraplus_lr_ratio=None, packing=None, masked=False, start="zero")
# The run in f64 must end this near, or the case would test its rounding: AdamW divides small gradients by their size.
DEVIATION = dict(loss=2e-6, grad_norm=1e-5, adapter=3e-5)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------

def make_examples(tok, rng, masked):
    """Small sentences to be said backwards: enough structure for the loss to fall."""
    words = "the cat dog farm river stone ran to and other naïve café wind rain".split()
    examples = []
    for i in range(24):
        said = [rng.choice(words) for _ in range(rng.randint(1, 7))]
        prompt = tok("say " + " ".join(said))["input_ids"]
        answer = tok(" " + " ".join(reversed(said)), add_special_tokens=False)["input_ids"] + [tok.eos_token_id]
        if i % 8 == 3:  # long prompts for short answers
            answer = answer[-2:]
        ids = prompt + answer
        targets = [0] * len(prompt) + [1] * len(answer) if masked else [0] + [1] * (len(ids) - 1)
        examples.append((ids, targets))
    return examples


def make_steps(examples, rng, how):
    """STEPS lists of sequences; packed ones are filled in the order drawn."""
    queue, steps = [], []

    def draw():
        if not queue:
            queue.extend(rng.sample(range(len(examples)), len(examples)))
        return queue.pop(0)

    for _ in range(STEPS):
        sequences = []
        for _ in range(how["batch_size"]):
            sequence, room = [draw()], how["packing"] or 0
            room -= len(examples[sequence[0]][0])
            while queue and len(examples[queue[0]][0]) <= room:
                sequence.append(draw())
                room -= len(examples[sequence[-1]][0])
            sequences.append(sequence)
        steps.append(sequences)
    return steps


def nll(model, examples, sequences, packed):
    """The sum over all targets of the sequences of -log p, computed as one padded batch."""
    width = max(sum(len(examples[i][0]) for i in s) for s in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    targets = torch.zeros(len(sequences), width, dtype=torch.bool)
    positions = torch.zeros(len(sequences), width, dtype=torch.long)
    owner = torch.full((len(sequences), width), -1)
    for row, sequence in enumerate(sequences):
        at = 0
        for i in sequence:
            n = len(examples[i][0])
            ids[row, at:at + n] = torch.tensor(examples[i][0])
            targets[row, at:at + n] = torch.tensor(examples[i][1], dtype=torch.bool)
            positions[row, at:at + n] = torch.arange(n)
            owner[row, at:at + n] = i
            at += n
    if packed:
        mine = (owner[:, :, None] == owner[:, None, :]) & torch.ones(width, width).tril().bool()
        dtype = next(model.parameters()).dtype
        mask = torch.zeros(mine.shape, dtype=dtype).masked_fill(~mine, torch.finfo(dtype).min)[:, None]
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    else:
        assert all(len(s) == 1 for s in sequences)
        logits = model(input_ids=ids, attention_mask=(owner >= 0).long(), use_cache=False).logits
    at = targets[:, 1:]
    return F.cross_entropy(logits[:, :-1][at], ids[:, 1:][at], reduction="sum"), int(at.sum())


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

def load_base(base, dtype):
    path = HERE / base
    if path.suffix == ".gguf":
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager")
    else:
        with tempfile.TemporaryDirectory() as copy:  # PEFT notes where the base model came from
            shutil.copytree(path, copy, dirs_exist_ok=True)
            model = generate.load_model(copy, generate.CASES[base][1])
    return model.to(dtype)


def adapt(base, lora, start, seed, dtype):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(seed)
    model = load_base(base, torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **json.loads(json.dumps(lora)))
    peft = get_peft_model(model, config)
    if start == "random":
        with torch.no_grad():
            for name, p in peft.named_parameters():
                if "lora_B" in name:
                    p.copy_(0.05 * torch.randn(p.shape))
    return peft.to(dtype).train()


def optimizer_of(peft, how):
    shared = dict(lr=how["learning_rate"], betas=(0.9, 0.999), eps=1e-8, foreach=False)
    if how["loraplus_lr_ratio"]:
        from peft.optimizers import create_loraplus_optimizer
        return create_loraplus_optimizer(
            model=peft, optimizer_cls=torch.optim.AdamW, loraplus_lr_ratio=how["loraplus_lr_ratio"],
            loraplus_weight_decay=how["weight_decay"], **shared)
    trained = [p for p in peft.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, weight_decay=how["weight_decay"], **shared)


def schedule_of(optimizer, how):
    if how["schedule"] == "constant":
        return transformers.get_constant_schedule_with_warmup(optimizer, how["warmup_steps"])
    get = {"linear": transformers.get_linear_schedule_with_warmup,
           "cosine": transformers.get_cosine_schedule_with_warmup}[how["schedule"]]
    return get(optimizer, how["warmup_steps"], STEPS)


def train(peft, examples, steps, how):
    """Runs all steps; what each of them saw."""
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = optimizer_of(peft, how)
    schedule = schedule_of(optimizer, how)
    seen = {"loss": [], "grad_norm": [], "learning_rate": [], "targets": []}
    for sequences in steps:
        count = sum(sum(examples[i][1]) for s in sequences for i in s)
        size = how["micro_batch_size"] or len(sequences)
        loss = 0.0
        for at in range(0, len(sequences), size):
            part, _ = nll(peft, examples, sequences[at:at + size], bool(how["packing"]))
            (part / count).backward()
            loss += part.item() / count
        norm = torch.nn.utils.clip_grad_norm_(trained, how["max_grad_norm"], foreach=False)
        seen["loss"].append(loss)
        seen["grad_norm"].append(norm.item())
        seen["learning_rate"].append(optimizer.param_groups[0]["lr"])
        seen["targets"].append(count)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        parts = [nll(peft, examples, [[i]], False) for i in range(len(examples))]
    seen["final_loss"] = sum(p.item() for p, _ in parts) / sum(n for _, n in parts)
    return seen


# --------------------------------------------------------------------------------------------------
# The files
# --------------------------------------------------------------------------------------------------

def save(peft, folder):
    peft.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = None
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set
    generate.write_json(path, config)
    (folder / "adapter_model.safetensors").chmod(0o644)


def relative(a, b):
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


def distance(a, b):
    """The largest |a - b| / |b| of a tensor."""
    return max(((a[k].double() - b[k].double()).norm() / b[k].double().norm()).item() for k in b)


def make_case(name):
    base, lora, changes, notes = CASES[name]
    how = {**DEFAULTS, **changes}
    folder = HERE / "finetune" / name
    tok = transformers.PreTrainedTokenizerFast.from_pretrained(HERE / "llama_gqa")
    for seed in range(1, 50):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rng = random.Random(f"{name}-{seed}")
        examples = make_examples(tok, rng, how["masked"])
        steps = make_steps(examples, rng, how)
        expected, deviation = reference(folder, base, lora, how, seed, examples, steps)
        report = " ".join(f"{k} {v:.1e}" for k, v in deviation.items())
        if all(deviation[key] <= most for key, most in DEVIATION.items()):
            break
        print(f"{name}: seed {seed} deviates: {report}", flush=True)
    else:
        raise SystemExit(f"{name}: no seed is stable")
    generate.write_golden(folder / "case.json", {
        "model": base, "notes": notes, "seed": seed, "lora": lora,
        "training": {k: how[k] for k in ("learning_rate", "schedule", "warmup_steps", "weight_decay", "max_grad_norm",
                                         "micro_batch_size", "loraplus_lr_ratio")},
        "examples": [{"token_ids": ids, "is_target": targets} for ids, targets in examples],
        "steps": steps,
        "expected": expected,
        "deviation": {k: float(f"{v:.2g}") for k, v in deviation.items()},
    })
    norms = expected["grad_norm"]
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{name}: loss {expected['loss'][0]:.3f} -> {expected['loss'][-1]:.3f} (all {expected['final_loss']:.3f}), "
          f"norms {min(norms):.2f}..{max(norms):.2f}, {report}, {size / 1024:.0f} KB", flush=True)


def reference(folder, base, lora, how, seed, examples, steps):
    """Trains in f32, leaving start/ and end/, and in f64: what was seen, and how far the two are from one another."""
    peft = adapt(base, lora, how["start"], seed, torch.float32)
    save(peft, folder / "start")
    if how["packing"]:
        with torch.no_grad():
            packed, _ = nll(peft, examples, steps[0], True)
            alone = sum(nll(peft, examples, [[i]], False)[0] for s in steps[0] for i in s)
        assert abs(packed - alone) < 1e-5 * alone, (packed, alone)
    expected = train(peft, examples, steps, how)
    save(peft, folder / "end")
    double = adapt(base, lora, how["start"], seed, torch.float64)
    exact = train(double, examples, steps, {**how, "micro_batch_size": 1})
    with tempfile.TemporaryDirectory() as other:
        save(double, Path(other))
        end, exact_end = (load_file(f / "adapter_model.safetensors") for f in (folder / "end", Path(other)))
    return expected, {
        "loss": relative(expected["loss"], exact["loss"]),
        "grad_norm": relative(expected["grad_norm"], exact["grad_norm"]),
        "adapter": distance(end, exact_end),
    }


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cases", nargs="*", help="names of cases; all by default")
    args = p.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for name in args.cases or CASES:
        make_case(name)


if __name__ == "__main__":
    main()
