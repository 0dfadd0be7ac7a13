#!/usr/bin/env python3
"""Writes small LoRA adapters for the models in this folder with PEFT, and what the adapted models answer.

    python tests/golden/adapters.py [ADAPTER...]

The committed output was made with peft 0.21.2 and the versions named in generate.py. Each folder in adapters/ holds
an adapter as PEFT saves it (adapter_config.json, adapter_model.safetensors) and golden.json as generate.py describes
it, with `base`, the name of the case that is adapted (or golden_from, the adapter that gives the same answers). All
factors are random, so none is without effect.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers

import generate

HERE = Path(__file__).resolve().parent
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name: (base case, LoraConfig, how it is stored and described)
ADAPTERS = {
    "lora_qv": ("llama_gqa", dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), dict(
        notes="Plain LoRA on q and v, scaled by alpha / r = 2; stored in f32.")),
    "rslora": ("llama_gqa", dict(
        r=4, lora_alpha=4, use_rslora=True, target_modules=LINEAR,
        rank_pattern={"down_proj": 2, "layers.0.self_attn.q_proj": 8},
        alpha_pattern={"v_proj": 6, "layers.1.mlp.up_proj": 1}), dict(
        dtype="bfloat16",
        notes="rsLoRA on every linear layer, scaled by alpha / sqrt(r), with ranks and alphas by pattern.")),
    "dora": ("llama_gqa", dict(r=4, lora_alpha=8, use_dora=True, target_modules=LINEAR), dict(
        notes="DoRA on every linear layer: rows of W + scale * B A, scaled to the stored magnitudes.")),
    "saved_lm_head": ("llama_gqa", dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]), dict(
        dtype="bfloat16", notes="modules_to_save: lm_head is replaced as a whole.")),
    "saved_embedding": ("llama_gqa", dict(
        r=2, lora_alpha=2, target_modules=["k_proj"], modules_to_save=["embed_tokens"]), dict(
        dtype="bfloat16", notes="modules_to_save: embed_tokens is replaced as a whole.")),
    "lora_embedding": ("llama_gqa", dict(
        r=4, lora_alpha=4, target_modules=["embed_tokens", "lm_head", "o_proj"]), dict(
        dtype="float16", notes="LoRA on the embedding (lora_embedding_A, lora_embedding_B) and on lm_head.")),
    "tied_saved_embedding": ("llama_tied", dict(
        r=2, lora_alpha=2, target_modules=["k_proj"], modules_to_save=["embed_tokens"]), dict(
        dtype="bfloat16", notes="modules_to_save: the embedding is replaced, the output tied to it is not.")),
    "falcon_qkv": ("falcon_40b", dict(
        r=4, lora_alpha=8, target_modules=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]), dict(
        dtype="bfloat16", notes="LoRA on the fused query_key_value of Falcon 40B, and on the other linear layers.")),
    "falcon_7b_qkv": ("falcon_7b", dict(r=4, lora_alpha=8, target_modules=["query_key_value"]), dict(
        dtype="bfloat16", notes="LoRA on the fused query_key_value of Falcon 7B.")),
    "phi3_fused": ("phi3", dict(r=4, lora_alpha=8, target_modules=["qkv_proj", "gate_up_proj"]), dict(
        dtype="bfloat16", notes="LoRA on the fused qkv_proj and gate_up_proj of Phi-3.")),
}


def adapt(model, config, seed, dtype):
    """A PEFT model around `model` with random factors that are exact in `dtype`."""
    from peft import LoraConfig, get_peft_model
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **json.loads(json.dumps(config))))
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if not p.requires_grad:
                continue
            noise = torch.randn(p.shape, generator=gen)
            if "magnitude" in name:
                values = p * (1.0 + 0.2 * noise)
            elif "modules_to_save" in name:
                values = 0.3 * noise
            else:
                values = 0.15 * noise
            p.copy_(values.to(dtype))
    return peft.eval()


def save(peft, folder, dtype):
    with torch.no_grad():
        for p in peft.parameters():
            if p.requires_grad:
                p.data = p.data.to(dtype)
    peft.save_pretrained(folder, save_embedding_layers=False)  # else a copy of what the factors are added to
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = None
    config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set
    generate.write_json(path, config)
    (folder / "adapter_model.safetensors").chmod(0o644)


def make_adapter(name):
    from peft import PeftModel
    base, config, how = ADAPTERS[name]
    dtype = getattr(torch, how.get("dtype", "float32"))
    folder = HERE / "adapters" / name
    tok = transformers.PreTrainedTokenizerFast.from_pretrained(HERE / base)
    unadapted = json.loads((HERE / base / "golden.json").read_text())["prompts"]
    for seed in range(1, 200):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as copy:  # PEFT notes where the base model came from
            shutil.copytree(HERE / base, copy, dirs_exist_ok=True)
            save(adapt(generate.load_model(copy, generate.CASES[base][1]), config, seed, dtype), folder, dtype)
            peft = PeftModel.from_pretrained(generate.load_model(copy, generate.CASES[base][1]), folder)
        model = peft.eval().get_base_model()
        golden = generate.references(model, tok, base)
        if golden:
            assert all(a["greedy"] != b["greedy"] for a, b in zip(golden["prompts"], unadapted)), name
            generate.write_golden(folder / "golden.json", {
                "base": base, "adapter": name, "seed": seed, **golden, "notes": how["notes"]})
            size = (folder / "adapter_model.safetensors").stat().st_size
            print(f"{name}: seed {seed}, margin {golden['min_margin']}, {size / 1024:.0f} KB", flush=True)
            return
    raise SystemExit(f"{name}: no seed keeps the margin")


def make_bin(name="lora_qv"):
    """An adapter once more as torch.save writes it; its answers are those of the first."""
    from safetensors.torch import load_file
    first, folder = HERE / "adapters" / name, HERE / "adapters" / f"{name}_bin"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(first / "adapter_config.json", folder)
    torch.save(load_file(first / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "golden_from").write_text(name + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("adapters", nargs="*", help="names of adapters; all by default")
    args = p.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for name in args.adapters or ADAPTERS:
        make_adapter(name)
    if not args.adapters:
        make_bin()


if __name__ == "__main__":
    main()
