#!/usr/bin/env python3
"""Writes the weights of one case of this folder in Meta's form and as pytorch_model.bin.

    python tests/golden/meta.py

The committed output was made with Python 3.11, torch 2.15.0 and safetensors 0.8.0 (after
generate.py); no number is computed, so another version gives the same weights. torch_files/legacy.pth
holds addresses and differs each time.

    meta_mp1, 2, 4, 8   consolidated.00.pth ... and params.json, as for 1, 2, 4 and 8 ranks
    llama_bin           pytorch_model.bin in two shards with an index, and config.json
    torch_files         small files of torch.save: what is read of them and what is not

golden_from in a folder names the case whose tokenizer and golden.json hold for it too.

How Meta cuts the tensors: github.com/meta-llama/llama, llama/model.py (ColumnParallelLinear,
RowParallelLinear, ParallelEmbedding; Llama 3: VocabParallelEmbedding). The order of the rows of
wq and wk: `permute` of transformers' convert_llama_weights_to_hf.py, undone. The case has 4 KV
heads: over 8 ranks, two neighbours hold the same one.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
SOURCE = "llama_bf16"

# Number of files: (dimension in which the embedding is cut, vocab_size in params.json)
FORMS = {1: (1, -1), 2: (1, -1), 4: (0, 272), 8: (1, -1)}

NAMES = {
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0), "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}


def interleaved(w, heads):
    """Rows of each head from halves (HF: 0, 2, 4 ... 1, 3, 5 ...) to pairs (Meta: 0, 1, 2 ...)."""
    rows, cols = w.shape
    return w.view(heads, 2, rows // heads // 2, cols).transpose(1, 2).reshape(rows, cols)


def meta_tensors(weights, config, embedding_dim):
    """Meta's name: (tensor, the dimension it is cut in)."""
    heads = {"attention.wq": config["num_attention_heads"], "attention.wk": config["num_key_value_heads"]}
    tensors = {
        "tok_embeddings.weight": (weights["model.embed_tokens.weight"], embedding_dim),
        "norm.weight": (weights["model.norm.weight"], None),
        "output.weight": (weights["lm_head.weight"], 0),
    }
    for layer in range(config["num_hidden_layers"]):
        for theirs, (name, dim) in NAMES.items():
            w = weights[f"model.layers.{layer}.{theirs}.weight"]
            w = interleaved(w, heads[name]) if name in heads else w
            tensors[f"layers.{layer}.{name}.weight"] = (w, dim)
    return tensors


def piece(name, tensor, dim, rank, ranks, config):
    if dim is None:
        return tensor
    kv_heads = config["num_key_value_heads"]
    if ranks > kv_heads and ("wk" in name or "wv" in name):
        rank, ranks = rank * kv_heads // ranks, kv_heads
    return tensor.chunk(ranks, dim)[rank]


def fresh(name):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def fresh_case(name):
    folder = fresh(name)
    (folder / "golden_from").write_text(SOURCE + "\n")
    return folder


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_meta(weights, config, ranks):
    embedding_dim, vocab_size = FORMS[ranks]
    folder = fresh_case(f"meta_mp{ranks}")
    tensors = meta_tensors(weights, config, embedding_dim)
    for rank in range(ranks):
        state = {name: piece(name, w, dim, rank, ranks, config).clone(memory_format=torch.contiguous_format)
                 for name, (w, dim) in tensors.items()}
        # Llama 1 and 2 have it too; nothing may come of it.
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        state["rope.freqs"] = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
        torch.save(state, folder / f"consolidated.{rank:02}.pth")
    # 2 * 4 * dim / 3 = 170, halved 85, up to a multiple of 32: 96.
    write_json(folder / "params.json", {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"], "n_kv_heads": config["num_key_value_heads"],
        "ffn_dim_multiplier": 0.5, "multiple_of": 32, "norm_eps": config["rms_norm_eps"],
        "vocab_size": vocab_size,
    })


def write_bin(weights, config_text):
    folder = fresh_case("llama_bin")
    (folder / "config.json").write_text(config_text)
    names = list(weights)
    weight_map, shards = {}, 2
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        mine = names[i * len(names) // shards:(i + 1) * len(names) // shards]
        torch.save({name: weights[name] for name in mine}, folder / file)
        weight_map.update({name: file for name in mine})
    size = sum(w.numel() * w.element_size() for w in weights.values())
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_torch_files():
    folder = fresh("torch_files")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "f32": base, "bf16": base.bfloat16(), "f16": base.half(), "rows": base[1:3], "scalar": torch.tensor(7.0),
        "parameter": torch.nn.Parameter(base[3]), "int64": torch.arange(3), "bool": torch.tensor([True, False]),
        "one_row": base.t()[2:3, 1:2], "empty": base[:0],
    }
    torch.save(state, folder / "flat.pth")
    torch.save(state, folder / "protocol4.pth", pickle_protocol=4)
    rest = {"step": 3, "lr": 1e-3, "seen": 1 << 80, "betas": (0.9, None), "names": ["a", "b"], "exp_avg": base.t()}
    torch.save({"optimizer": {"state": {0: rest}}, "epoch": -1, "model": state}, folder / "wrapped.pth")
    torch.save(torch.nn.Linear(6, 2).state_dict(), folder / "module.pth")  # an OrderedDict with _metadata
    torch.save({"turned": base.t()}, folder / "not_contiguous.pth")
    torch.save({"w": base, "type": torch.float16}, folder / "other_class.pth")
    torch.save(base, folder / "bare_tensor.pth")
    torch.save({"w": base}, folder / "legacy.pth", _use_new_zipfile_serialization=False)


def main():
    torch.manual_seed(1)
    write_torch_files()
    source = HERE / SOURCE
    config_text = (source / "config.json").read_text()
    config = json.loads(config_text)
    weights = {name: w.clone() for name, w in sorted(load_file(source / "model.safetensors").items())}
    for ranks in FORMS:
        write_meta(weights, config, ranks)
    write_bin(weights, config_text)


if __name__ == "__main__":
    main()
