#!/usr/bin/env python3
"""Checkpoints of published sizes, all holes and no weights: what `farm inspect` makes of them.

    python tests/real/sizes.py FARM FOLDER [NAME]

FARM is the binary; FOLDER takes one sparse checkpoint at a time (some MB on disk, hundreds of GB of holes) and needs a
file system that has them. FOLDER/tokenizer.model is the tokenizer of Meta's forms. Prints a row each: whether the parameters
are right (to a thousandth: farm counts matrices only), bytes, shards, tensor-parallel sizes, and what reading took. Needs
torch and transformers.
"""

import collections
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import torch
from configs import META, MODELS
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration

SHARD_BYTES_MAX = 5_000_000_000


def shapes(config):
    """Names and shapes of the tensors, as the published files have them (transformers joins experts, and has other names for
    parts of Gemma 3)."""
    family = config["model_type"]
    if family.startswith("RefinedWeb"):
        # transformers reads Falcon's first spelling no longer.
        new = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads"}
        config = {new.get(key, key): value for key, value in config.items()}
        config |= {"model_type": "falcon", "new_decoder_architecture": family == "RefinedWeb"}
        family = "falcon"
    # The factors of LongRoPE change no shape, and transformers wants them in its newer spelling.
    known = AutoConfig.for_model(**{**config, "rope_scaling": None})
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(known) if family == "gemma3" else AutoModelForCausalLM.from_config(known)
    tied = set(model._tied_weights_keys or []) if known.get_text_config().tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        # Falcon's files have the tied output projection too.
        if name not in tied or family == "falcon":
            yield from published(name, list(tensor.shape), family)


def published(name, shape, family):
    if name.startswith("model.language_model."):
        name = "language_model.model." + name.removeprefix("model.language_model.")
    elif family == "gemma3":
        name = name.removeprefix("model.")
    if ".experts." not in name:
        yield name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if family == "mixtral" else name, shape
        return
    layer, last = name.split(".mlp.experts.")
    count, rows, columns = shape
    mixtral = family == "mixtral"
    prefix = f"{layer}.block_sparse_moe.experts" if mixtral else f"{layer}.mlp.experts"
    for expert in range(count):
        if last == "down_proj":
            yield f"{prefix}.{expert}.{'w2' if mixtral else 'down_proj'}.weight", [rows, columns]
        else:
            for part in ("w1", "w3") if mixtral else ("gate_proj", "up_proj"):
                yield f"{prefix}.{expert}.{part}.weight", [rows // 2, columns]


def write_safetensors(folder, config):
    """Shards with real headers and an index."""
    dtype = {"bfloat16": "BF16", "float16": "F16"}[config["torch_dtype"]]
    shards, size = [{}], 0
    for name, shape in shapes(config):
        length = 2 * math.prod(shape)
        if size + length > SHARD_BYTES_MAX and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + length]}
        size += length
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        header = json.dumps({"__metadata__": {"format": "pt"}, **shard}).encode()
        header += b" " * (-len(header) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            out.truncate(out.tell() + max(tensor["data_offsets"][1] for tensor in shard.values()))
        index.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))


# --------------------------------------------------------------------------------------------------
# Meta's form
# --------------------------------------------------------------------------------------------------


class Storage:
    def __init__(self, key, length):
        self.key, self.length = str(key), length


class Tensor:
    """Pickles as a tensor of torch.save."""

    def __init__(self, key, shape):
        self.storage, self.shape = Storage(key, math.prod(shape)), tuple(shape)

    def __reduce__(self):
        strides = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, collections.OrderedDict())


class Pickler(pickle._Pickler):
    def persistent_id(self, value):
        if isinstance(value, Storage):
            return "storage", torch.HalfStorage, value.key, "cpu", value.length
        return None


def meta_shapes(params, files, vocab):
    dim, heads = params["dim"], params["n_heads"]
    kv = dim // heads * params.get("n_kv_heads", heads)
    inner = int(params.get("ffn_dim_multiplier", 1) * int(8 * dim / 3))
    inner = -(-inner // params["multiple_of"]) * params["multiple_of"]
    yield "tok_embeddings.weight", (vocab, dim // files)
    yield "norm.weight", (dim,)
    yield "output.weight", (vocab // files, dim)
    for layer in range(params["n_layers"]):
        for name, shape in {"attention.wq": (dim // files, dim), "attention.wk": (kv // files, dim), "attention.wv": (kv // files, dim), "attention.wo": (dim, dim // files),
                            "feed_forward.w1": (inner // files, dim), "feed_forward.w2": (dim, inner // files), "feed_forward.w3": (inner // files, dim),
                            "attention_norm": (dim,), "ffn_norm": (dim,)}.items():
            yield f"layers.{layer}.{name}.weight", shape
    yield "rope.freqs", (dim // heads // 2,)


def write_meta(folder, params, files, tokenizer):
    shutil.copy(tokenizer, folder / "tokenizer.model")
    (folder / "params.json").write_text(json.dumps(params))
    tensors = {name: Tensor(key, shape) for key, (name, shape) in enumerate(meta_shapes(params, files, 32000))}
    for number in range(files):
        with open(folder / f"consolidated.{number:02}.pth", "wb") as out:
            write_zip(out, tensors)


def write_zip(out, tensors):
    """torch.save's archive: nothing compressed, data at multiples of 64; holes for the tensors."""
    import io

    pickled = io.BytesIO()
    Pickler(pickled, 2).dump(tensors)
    entries = [("archive/data.pkl", pickled.getvalue(), 0)]
    entries += [(f"archive/data/{tensor.storage.key}", b"", 2 * tensor.storage.length) for tensor in tensors.values()]
    entries.append(("archive/version", b"3\n", 0))
    central = b""
    for name, data, hole in entries:
        name, length, offset = name.encode(), len(data) + hole, out.tell()
        padding = -(offset + 30 + len(name) + 20 + 4) % 64
        sizes = struct.pack("<HHQQ", 1, 16, length, length)
        extra = sizes + struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        out.write(struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra)) + name + extra + data)
        out.truncate(out.tell() + hole)
        out.seek(hole, os.SEEK_CUR)
        extra = struct.pack("<HHQQQ", 1, 24, length, length, offset)
        central += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 45, 45, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF) + name + extra
    start = out.tell()
    out.write(central)
    end = out.tell()
    out.write(struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, len(entries), len(entries), len(central), start))
    out.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1) + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


# --------------------------------------------------------------------------------------------------


def inspect(farm, folder, *flags):
    """Its answer, the seconds and the memory it took."""
    start = time.perf_counter()
    process = subprocess.Popen([farm, "inspect", folder, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, error = process.communicate()
    seconds = time.perf_counter() - start
    return (out if process.returncode == 0 else error), seconds, process.returncode


def row(farm, name, folder, parameters):
    out, seconds, code = inspect(farm, folder, "--json")
    if code:
        print(f"{name}: {out.strip()[:400]}", flush=True)
        return
    found = json.loads(out)
    listed, seconds_all, _ = inspect(farm, folder, "--tensors")
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".pth")]
    bytes_all = sum(path.stat().st_size for path in files)
    # farm counts matrices; norms and biases are less than a thousandth.
    right = 0 <= 1 - found["parameters"] / parameters < 1e-3
    sizes = [row.get("tensor_parallel") for row in found["memory"]]
    print(f"{name}: {found['parameters']:,} parameters ({'right' if right else f'SHOULD BE {parameters:,}'}), {bytes_all / 1e9:.1f} GB, {len(files)} files, "
          f"context {found['context_length']:,}, TP {sizes}, inspect {seconds:.2f} s, --tensors {seconds_all:.2f} s, {len(listed.splitlines())} lines", flush=True)


if __name__ == "__main__":
    farm, folder, *only = sys.argv[1:]
    model = Path(folder) / "sparse"
    for name, (config, *rest) in {**MODELS, **META}.items():
        if only and only[0] not in name:
            continue
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir(parents=True)
        if name in META:
            write_meta(model, config, rest[0], Path(folder) / "tokenizer.model")
        else:
            write_safetensors(model, config)
        row(farm, name, model, rest[-1])
    shutil.rmtree(model, ignore_errors=True)
