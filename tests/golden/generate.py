#!/usr/bin/env python3
"""Writes the reference models and answers in this folder with Hugging Face transformers.

    python tests/golden/generate.py            # everything
    python tests/golden/generate.py llama_gqa  # one case
    python tests/golden/generate.py chat       # the chat templates

The committed output was made with Python 3.11, torch 2.15.0, transformers 5.23.0, tokenizers 0.23.3,
safetensors 0.8.0 and jinja2 3.1.6 on an AVX-512 CPU. Another version or CPU may move the last bits of
the floating-point values; the greedy tokens have a margin (see MARGIN) that survives that.

Each case folder holds a small random model as a user would have it (config.json, safetensors, tokenizer,
generation_config.json) and golden.json:

    seed             the seed that was settled on (the first one whose greedy paths keep the margin)
    min_margin       the smallest gap between the best and the second-best logit on all greedy paths
    notes            what is special about the case
    prompts[]
      text             the prompt; prompt_token_ids is what the tokenizer makes of it (<s> in front)
      greedy           token ids of greedy decoding, the end of sequence ignored
      greedy_text      those tokens decoded, special tokens skipped
      last_logits      f32 logits at the prompt's last position, the whole vocabulary
      logprobs         log-probability of each prompt token but the first, given those before it
      logprob          their sum
      logits           (the shortest prompt only) f32 logits at every position

Everything is computed in f32 on the CPU with attn_implementation="eager" (but see falcon_rw) and
use_cache=False: one forward over the whole sequence for every new token, with a fresh rotary embedding each
time. For bf16 and f16 cases the stored weights are upcast to f32 first.

Where the frequencies depend on the length of the sequence (rope_dynamic, longrope), a prompt has also

      greedy_use_cache what a plain loop over the KV cache gives: cached keys stay as they were rotated
      greedy_generate  what transformers' own generate() gives
"""

import argparse
import json
import math
import shutil
import string
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent
MARGIN = 5e-3
ROUTING_MARGIN = 1e-3  # between the last router logit that gets an expert and the first that does not
NEW_TOKENS = 32
VOCAB = 272

PROMPTS = [
    "The cat",
    "naïve café → 東京",
    "Once upon a time there was a farm",
    "Slurm runs the job on four nodes; every rank reads its share of the prompts, and the answers are "
    "written in the order of the input.",
]

# --------------------------------------------------------------------------------------------------
# The tokenizer that all cases share
# --------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<' + message['role'] + '>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def write_tokenizer(folder):
    """Byte-level BPE: 4 special tokens, the 256 bytes, a dozen merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, show_progress=False, special_tokens=[AddedToken(s, special=True) for s in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(PROMPTS + ["the cat and the dog ran to the other farm"] * 4, trainer)
    assert tok.get_vocab_size() == VOCAB
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tok.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
        "eos_token": "</s>", "pad_token": "<pad>", "model_max_length": 512,
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    })
    return PreTrainedTokenizerFast.from_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# The cases
# --------------------------------------------------------------------------------------------------

BASE = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5,
    rope_theta=10000.0, tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
    hidden_act="silu", bos_token_id=1, eos_token_id=2, pad_token_id=3)
# Heads of 16 values, so that the scaled frequencies fall into different bands.
ROPE = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)

# What every other family has in its config.json too. hidden_size / heads is 16, so that TP 1, 2 and 4 divide.
COMMON = dict(
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=3)
# The families that follow Llama's names.
KIN = dict(COMMON, intermediate_size=64, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=10000.0,
           tie_word_embeddings=False, hidden_act="silu")
FALCON = dict(COMMON, num_attention_heads=8, layer_norm_epsilon=1e-5, activation="gelu", rope_theta=10000.0,
              alibi=False, bias=False, multi_query=True, parallel_attn=True, new_decoder_architecture=False)
GEMMA2 = dict(COMMON, intermediate_size=64, num_key_value_heads=2, head_dim=24, query_pre_attn_scalar=20,
             rms_norm_eps=1e-6, rope_theta=10000.0, hidden_activation="gelu_pytorch_tanh", sliding_window=16)
GEMMA3 = dict(GEMMA2, num_hidden_layers=3)
# Six frequencies (three quarters of a head of 16) or eight; the prompts cross the 48 original positions.
LONGROPE = dict(max_position_embeddings=192, original_max_position_embeddings=48)
SHORT_FACTOR = [1.0, 1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5]
LONG_FACTOR = [1.0, 1.1, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
LONGROPE_NOTES = (
    "The frequencies are divided by short_factor while the sequence has at most original_max_position_embeddings = "
    "48 tokens and by long_factor from then on; cos and sin are scaled by sqrt(1 + ln(192 / 48) / ln(48)) at every "
    "length. greedy, logits and logprobs rotate the whole sequence by its length at that step. greedy_generate agrees "
    "with that: generate() recomputes the cache once when the length passes 48. greedy_use_cache does not.")

# Tied embeddings answer with the token they saw, unless the layers say more than in untied models.
LOUD = dict(weights=dict(spread=0.25))
# Gemma multiplies its embeddings by sqrt(hidden_size).
GEMMA_LOUD = dict(weights=dict(spread=0.25, embedding_spread=0.12, output_gain=4.0))

# name: (config, how it is stored and described)
CASES = {
    "llama_mha": (dict(num_key_value_heads=8), dict(
        notes="Multi-head attention (as many KV heads as heads), untied; rope_theta in the classic place.")),
    "llama_gqa": (dict(), dict(
        shard="120KB", notes="Grouped-query attention, 8 heads over 4 KV heads, untied; sharded with an index.")),
    "llama_tied": (dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                        num_hidden_layers=3), dict(
        notes="Tied embeddings (no lm_head.weight in the file), 4 heads over 2 KV heads, 3 layers.")),
    "llama_head_dim": (dict(head_dim=12, num_attention_heads=4, num_key_value_heads=2), dict(
        notes="head_dim is 12 where hidden_size / heads is 16.")),
    "llama_bias": (dict(attention_bias=True, mlp_bias=True, num_attention_heads=4, num_key_value_heads=2), dict(
        notes="Biases on q, k, v, o and on gate, up, down; all random and non-zero.")),
    "llama_bf16": (dict(), dict(
        dtype="bfloat16", notes="Weights stored in bf16; the references are f32 arithmetic on those weights.")),
    "llama_f16": (dict(), dict(
        dtype="float16", notes="Weights stored in f16; the references are f32 arithmetic on those weights.")),
    "llama_modern": (dict(), dict(
        modern=True, dtype="bfloat16",
        notes="config.json exactly as transformers 5 writes it: rope_parameters and dtype, no rope_theta at the top.")),
    "rope_linear": (dict(ROPE, rope_scaling={"type": "linear", "factor": 2.0}), dict(
        notes="Linear scaling under the oldest spelling: rope_scaling.type.")),
    "rope_dynamic": (dict(ROPE, max_position_embeddings=32, rope_scaling={"rope_type": "dynamic", "factor": 2.0}), dict(
        dynamic=True,
        notes="Dynamic NTK. base' = base * (factor * n / max_position_embeddings - (factor - 1)) ** (d / (d - 2)) "
              "for a sequence of n > max_position_embeddings tokens, else base. greedy, logits and logprobs are "
              "from one forward over the whole sequence per step: every key and query is rotated with the base "
              "of the sequence's length at that step. greedy_use_cache is what generate() gives with its KV "
              "cache: keys already cached stay rotated with the base of the step that cached them. Prompts and "
              "answers that stay within 32 tokens agree in both.")),
    "rope_yarn": (dict(ROPE, max_position_embeddings=256, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}), dict(
        notes="YaRN with its defaults (beta_fast 32, beta_slow 1, attention factor 0.1 ln(factor) + 1); "
              "the long prompt passes the original 64 positions.")),
    "rope_llama3": (dict(ROPE, max_position_embeddings=512, rope_theta=10000.0, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}), dict(
        modern=True, notes="Llama-3.1 scaling in the newer spelling, rope_parameters; the frequencies fall into "
                           "all three bands.")),

    "mistral": (dict(KIN, sliding_window=16), dict(
        family="mistral", drop=["head_dim"], dtype="bfloat16",
        notes="Mistral 7B v0.1: a token sees itself and the 15 before it; classic spelling.")),
    "mistral_nemo": (dict(KIN, head_dim=24, sliding_window=None, rope_theta=1000000.0), dict(
        family="mistral", modern=True, dtype="float16",
        notes="Mistral Nemo: head_dim is 24 where hidden_size / heads is 16, sliding_window null; rope_parameters.")),

    "falcon_7b": (dict(FALCON, hidden_size=56, num_attention_heads=7), dict(
        family="falcon", drop=["ffn_hidden_size", "tie_word_embeddings", "num_ln_in_parallel_attn"], dtype="bfloat16",
        notes="Falcon 7B: multi_query (7 heads over 1 KV head; num_kv_heads = 7 in config.json has no meaning), one "
              "LayerNorm for attention and MLP, which run in parallel; tied, and config.json does not say so. Rows of "
              "query_key_value: 7 heads of q, k, v. Seven heads divide over one rank only.")),
    "falcon_40b": (dict(FALCON, new_decoder_architecture=True, num_kv_heads=2), dict(
        family="falcon", drop=["ffn_hidden_size", "num_ln_in_parallel_attn"], dtype="bfloat16",
        notes="Falcon 40B and 180B: new_decoder_architecture, 8 heads over 2 KV heads, ln_attn and ln_mlp in parallel. "
              "Rows of query_key_value, for each KV head: its 4 heads of q, its k, its v.")),
    "falcon2_11b": (dict(FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1,
                         ffn_hidden_size=160, rope_theta=500042.0, tie_word_embeddings=False), dict(
        family="falcon", modern=True, dtype="bfloat16",
        notes="Falcon2 11B: new_decoder_architecture with one LayerNorm (input_layernorm), untied, ffn_hidden_size "
              "given; rope_parameters.")),
    "falcon_rw": (dict(FALCON, alibi=True, bias=True, multi_query=False, parallel_attn=False), dict(
        family="falcon", drop=["ffn_hidden_size", "rope_theta", "rope_scaling"], dtype="bfloat16", attention="sdpa",
        notes="Falcon RW: ALiBi, biases, MLP after attention with a LayerNorm of its own (post_attention_layernorm). "
              "Rows of query_key_value, for each head: its q, its k, its v. Scores are (q.k + slope * key position) / "
              "sqrt(head_dim); made with sdpa, as eager in this version of transformers adds the slopes twice. "
              "The slopes of 8 heads are powers of two, exact in bf16.")),
    "falcon_rw_16_heads": (dict(FALCON, num_attention_heads=16, alibi=True, bias=True, multi_query=False,
                                parallel_attn=False, ffn_hidden_size=64, tie_word_embeddings=False), dict(
        family="falcon", drop=["rope_theta", "rope_scaling"], dtype="bfloat16", attention="sdpa",
        notes="As falcon_rw, untied, with 16 heads of 4 values: transformers rounds the slopes to bf16, and then the "
              "products of slope and key position (0, 1, 2 ...) to bf16 again, whatever the type of the model.")),

    "qwen2": (dict(KIN, use_sliding_window=False, sliding_window=16, max_window_layers=1), dict(
        family="qwen2", drop=["layer_types"], dtype="bfloat16",
        notes="Biases on q, k and v, none on o; untied. use_sliding_window is false: sliding_window has no meaning.")),
    "qwen2_tied": (dict(KIN, tie_word_embeddings=True, rope_theta=1000000.0), dict(
        family="qwen2", **LOUD, modern=True, dtype="float16",
        notes="Tied embeddings; rope_parameters and layer_types.")),
    "qwen2_window": (dict(KIN, num_hidden_layers=3, tie_word_embeddings=True, use_sliding_window=True,
                          sliding_window=16, max_window_layers=1), dict(
        family="qwen2", **LOUD, drop=["layer_types"], dtype="bfloat16",
        notes="use_sliding_window with max_window_layers = 1: layer 0 sees everything, layers 1 and 2 16 tokens.")),
    "qwen3": (dict(KIN, head_dim=24, tie_word_embeddings=True, rope_theta=1000000.0), dict(
        family="qwen3", **LOUD, drop=["layer_types"], dtype="bfloat16",
        notes="RMSNorm over each head of q and k before the rotation; head_dim 24; tied; classic spelling.")),
    "qwen3_untied": (dict(KIN, head_dim=16, attention_bias=True, rope_theta=1000000.0), dict(
        family="qwen3", modern=True, dtype="float16",
        notes="Untied, attention_bias (q, k, v and o); rope_parameters and layer_types.")),

    "phi3": (dict(KIN, num_key_value_heads=4, sliding_window=16), dict(
        family="phi3", drop=["partial_rotary_factor"], dtype="bfloat16",
        notes="Phi-3 mini 4k: fused qkv_proj (rows q, k, v) and gate_up_proj (rows gate, up), as many KV heads as "
              "heads, a window of 16; classic spelling.")),
    "phi3_longrope": (dict(KIN, **LONGROPE, rope_scaling={
        "type": "longrope", "short_factor": SHORT_FACTOR, "long_factor": LONG_FACTOR}), dict(
        family="phi3", drop=["partial_rotary_factor"], dtype="bfloat16", dynamic="longrope",
        notes="Phi-3 128k: longrope in the classic spelling. " + LONGROPE_NOTES)),
    "phi4_mini": (dict(KIN, **LONGROPE, partial_rotary_factor=0.75, tie_word_embeddings=True, rope_scaling={
        "type": "longrope", "short_factor": SHORT_FACTOR[:6], "long_factor": LONG_FACTOR[:6]}), dict(
        family="phi3", **LOUD, dtype="bfloat16", dynamic="longrope",
        notes="Phi-4 mini: the first 12 of 16 values of a head are rotated, 4 heads over 2 KV heads, tied; longrope in "
              "the classic spelling. " + LONGROPE_NOTES)),
    "phi4_mini_modern": (dict(KIN, **LONGROPE, partial_rotary_factor=0.75, rope_scaling={
        "rope_type": "longrope", "short_factor": SHORT_FACTOR[:6], "long_factor": LONG_FACTOR[:6]}), dict(
        family="phi3", modern=True, dtype="float16", dynamic="longrope",
        notes="As phi4_mini, untied, with rope_parameters. " + LONGROPE_NOTES)),

    "gemma2": (dict(GEMMA2, attn_logit_softcapping=2.0, final_logit_softcapping=5.0), dict(
        family="gemma2", **GEMMA_LOUD, drop=["layer_types", "tie_word_embeddings", "rope_scaling"], dtype="bfloat16",
        notes="Soft-capping of scores (2) and logits (5), layer 0 with a window of 16, layer 1 without, scores scaled "
              "by 1 / sqrt(query_pre_attn_scalar = 20); tied, and config.json does not say so; classic spelling.")),
    "gemma2_modern": (dict(GEMMA2, attn_logit_softcapping=2.0, final_logit_softcapping=None), dict(
        family="gemma2", **GEMMA_LOUD, modern=True, dtype="float16",
        notes="Soft-capping of scores only; rope_parameters and layer_types.")),
    "gemma3": (dict(GEMMA3, sliding_window_pattern=3, rope_theta=1000000.0, rope_local_base_freq=10000.0,
                    rope_scaling={"rope_type": "linear", "factor": 8.0}), dict(
        family="gemma3_text", **GEMMA_LOUD, dtype="bfloat16",
        drop=["layer_types", "tie_word_embeddings", "_sliding_window_pattern"],
        notes="Norms over each head of q and k; layers 0 and 1 have a window of 16 and base 10000, layer 2 sees "
              "everything with base 1000000 and its positions divided by 8 (sliding_window_pattern = 3); classic "
              "spelling.")),
    "gemma3_modern": (dict(GEMMA3, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                           rope_theta=1000000.0, rope_local_base_freq=10000.0,
                           rope_scaling={"rope_type": "linear", "factor": 8.0}), dict(
        family="gemma3_text", **GEMMA_LOUD, modern=True, dtype="bfloat16",
        notes="rope_parameters for each type of layer, and layer_types.")),

    "mixtral": (dict(KIN, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
                     rope_theta=1000000.0), dict(
        family="mixtral", drop=["head_dim"], dtype="bfloat16",
        notes="4 experts, 2 a token, their weights normalized to one; classic spelling.")),
    "mixtral_modern": (dict(KIN, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
                            tie_word_embeddings=True), dict(
        family="mixtral", **LOUD, modern=True, dtype="bfloat16", notes="With a window of 16, tied; rope_parameters.")),
    "qwen3_moe": (dict(KIN, head_dim=24, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
                       norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=True,
                       rope_theta=1000000.0), dict(
        family="qwen3_moe", **LOUD, drop=["num_local_experts"], dtype="bfloat16",
        notes="8 experts, 2 a token, their weights normalized to one; every layer is sparse; classic spelling.")),
    "qwen3_moe_mixed": (dict(KIN, head_dim=16, num_hidden_layers=4, num_experts=8, num_experts_per_tok=3,
                             moe_intermediate_size=16, intermediate_size=48, norm_topk_prob=False,
                             decoder_sparse_step=2, mlp_only_layers=[3], tie_word_embeddings=True), dict(
        family="qwen3_moe", **LOUD, modern=True, dtype="bfloat16",
        notes="Only layer 1 is sparse (decoder_sparse_step = 2, mlp_only_layers = [3]), 3 of 8 experts, weights not "
              "normalized; rope_parameters.")),
}


def wanted_config(name):
    changes, how = CASES[name]
    return changes if "family" in how else {**BASE, **changes}


def random_weights(model, seed, spread=0.15, embedding_spread=0.3, output_gain=1.0):
    """Weights large enough for varied answers, norms spread around one, biases non-zero."""
    gen = torch.Generator().manual_seed(seed)
    # Gemma keeps its norms' weights less one, and has norms on what its layers add to the stream as well.
    one = 1.0 if model.config.model_type.startswith("gemma") else 0.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=gen)
            if name.endswith("bias"):
                p.copy_(0.2 * noise)
            elif "norm" in name or "ln_" in name:
                output = one and ("post_attention" in name or "post_feedforward" in name)
                p.copy_((output_gain if output else 1.0) - one + 0.2 * noise)
            elif "embed" in name or "lm_head" in name:
                p.copy_(embedding_spread * noise)
            else:
                p.copy_(spread * noise)


def classic_config(path, wanted, drop=()):
    """Rewrites what transformers 5 saved into the spelling of most files in the wild."""
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    if "head_dim" not in wanted:  # older files leave it to hidden_size / num_attention_heads
        config.pop("head_dim", None)
    config["rope_scaling"] = None
    config.update(wanted)
    for key in drop:
        config.pop(key, None)
    config["torch_dtype"] = config.pop("dtype", "float32")
    write_json(path, dict(sorted(config.items())))


def write_model(folder, name, seed):
    from transformers import AutoConfig, AutoModelForCausalLM
    how, wanted = CASES[name][1], wanted_config(name)
    # transformers edits the dictionaries it is given.
    config = AutoConfig.for_model(how.get("family", "llama"), **json.loads(json.dumps(wanted)))
    model = AutoModelForCausalLM.from_config(config)
    random_weights(model, seed, **how.get("weights", {}))
    model = model.to(getattr(torch, how.get("dtype", "float32")))
    for old in folder.glob("model*"):
        old.unlink()
    model.save_pretrained(folder, max_shard_size=how.get("shard", "1GB"))
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    if not how.get("modern"):
        classic_config(folder / "config.json", wanted, how.get("drop", ()))


# --------------------------------------------------------------------------------------------------
# References
# --------------------------------------------------------------------------------------------------

def forget_lengths(model):
    """Gives the model a fresh rotary embedding: some kinds keep the frequencies of the longest sequence seen."""
    decoder = model.base_model
    decoder.rotary_emb = type(decoder.rotary_emb)(model.config)


def watch_routing(model):
    """A list that gathers, for each forward and sparse layer, the smallest distance from another choice of experts."""
    gaps = []

    def note(router, _, output):
        top = output[0].topk(router.top_k + 1, dim=-1).values
        gaps.append((top[:, -2] - top[:, -1]).min().item())

    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(note)
    return gaps


def forward(model, ids):
    """Logits (positions x vocabulary) of one whole sequence, free of any state of earlier calls."""
    forget_lengths(model)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def greedy(model, ids):
    """Greedy tokens and the smallest margin met."""
    ids, start, margin = list(ids), len(ids), math.inf
    for _ in range(NEW_TOKENS):
        top = forward(model, ids)[-1].topk(2)
        margin = min(margin, (top.values[0] - top.values[1]).item())
        ids.append(top.indices[0].item())
    return ids[start:], margin


def greedy_use_cache(model, ids):
    """Greedy tokens on the KV cache: prefill, then one token at a time."""
    forget_lengths(model)
    ids = torch.tensor([ids])
    out, cache, step = [], None, ids
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            result = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            out.append(result.logits[0, -1].argmax().item())
            step = torch.tensor([[out[-1]]])
    return out


def greedy_generate(model, ids):
    """Greedy tokens of transformers' own loop."""
    forget_lengths(model)
    model.generation_config.eos_token_id = None
    new = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                         do_sample=False, max_new_tokens=NEW_TOKENS)
    return new[0, len(ids):].tolist()


def f32(values):
    """Shortest decimals that read back to the same f32."""
    return [float(np.format_float_positional(np.float32(v), unique=True, trim="0")) for v in values]


def load_model(folder, how):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=how.get("attention", "eager")).eval()


def references(model, tok, name):
    """What golden.json holds of the model's answers; None where a greedy path is too close to another."""
    _, how = CASES[name]
    smallest, prompts, gaps = math.inf, [], watch_routing(model)
    for i, text in enumerate(PROMPTS):
        ids = tok(text)["input_ids"]
        new, margin = greedy(model, ids)
        smallest = min(smallest, margin)
        if smallest < MARGIN or min(gaps, default=math.inf) < ROUTING_MARGIN or len(set(new)) < 8:
            return None
        logits = forward(model, ids)
        logprobs = torch.log_softmax(logits[:-1].double(), -1)[torch.arange(len(ids) - 1), ids[1:]]
        record = {
            "text": text, "prompt_token_ids": ids, "greedy": new,
            "greedy_text": tok.decode(new, skip_special_tokens=True),
            "last_logits": f32(logits[-1]), "logprobs": f32(logprobs), "logprob": float(f"{logprobs.sum():.7g}"),
        }
        if how.get("dynamic"):
            record["greedy_use_cache"] = greedy_use_cache(model, ids)
            if how["dynamic"] == "longrope":
                record["greedy_generate"] = greedy_generate(model, ids)
        elif greedy_use_cache(model, ids) != new:
            raise SystemExit(f"{name}: the cache changes the answer")
        if i == 0:
            record["logits"] = [f32(row) for row in logits]
        prompts.append(record)
    return {"notes": how["notes"], "min_margin": float(f"{smallest:.4g}"), "prompts": prompts}


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_golden(path, golden):
    """JSON with each list of numbers on a line of its own."""
    lists = []

    def pull(value):
        if isinstance(value, list) and value and isinstance(value[0], (int, float)):
            lists.append(json.dumps(value, separators=(",", ":")))
            return f"@{len(lists) - 1}@"
        if isinstance(value, list):
            return [pull(v) for v in value]
        if isinstance(value, dict):
            return {k: pull(v) for k, v in value.items()}
        return value

    text = json.dumps(pull(golden), indent=1, ensure_ascii=False)
    for i, numbers in enumerate(lists):
        text = text.replace(f'"@{i}@"', numbers)
    path.write_text(text + "\n")
    assert json.loads(text) == golden


def make_case(name):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tok = write_tokenizer(folder)
    for seed in range(1, 200):
        write_model(folder, name, seed)
        golden = references(load_model(folder, CASES[name][1]), tok, name)
        if golden:
            write_golden(folder / "golden.json", {"case": name, "seed": seed, **golden})
            size = sum(f.stat().st_size for f in folder.iterdir())
            print(f"{name}: seed {seed}, margin {golden['min_margin']}, {size / 1024:.0f} KB", flush=True)
            return
    raise SystemExit(f"{name}: no seed keeps the margin")


# --------------------------------------------------------------------------------------------------
# Chat templates
# --------------------------------------------------------------------------------------------------

CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != 'tool') %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

CHATML_PLAIN = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
                "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
                "{% endif %}")

LLAMA2 = ("{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
          "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
          "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
          "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
          "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
          "{% if loop.index0 == 0 and system_message != false %}"
          "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
          "{% else %}{% set content = message['content'] %}{% endif %}"
          "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
          "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}"
          "{% endfor %}")

LLAMA3 = ("{% set loop_messages = messages %}{% for message in loop_messages %}"
          "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
          "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
          "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")

LLAMA31 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{#- The system message is taken out, so that it can be placed where it belongs. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You have access to the following functions.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0, last_user=-1) %}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- set ns.last_user = loop.index0 %}
    {%- endif %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.index0 == ns.last_user and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

# The line breaks here are the template's own: trim_blocks and lstrip_blocks decide what stays.
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

PHI3 = ("{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")

GEMMA = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
         "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
         "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
         "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
         "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}")

THINKING = """{%- macro render(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {%- if part.type == 'text' %}{{- part.text }}{% elif part is mapping and 'image' in part %}<image>{% endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and not (render(message.content).startswith('<tool_response>') and render(message.content).endswith('</tool_response>')) %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = render(message.content) %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and thought %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

GENERATION = """{% for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}

{%- else %}
{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] }}
{%- endif %}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

METHODS = """{%- for m in messages -%}
  {%- set label = m['role'].upper() if loop.first else m.role | title -%}
  {{- label ~ ' (' ~ loop.index ~ '/' ~ loop.length ~ '): ' -}}
  {{- m.get('name', 'nobody').title() ~ ': ' if m.role == 'user' else '' -}}
  {{- m['content'].replace('\\t', ' ').lstrip().rstrip() | replace('  ', ' ') -}}
  {{- '' if loop.last else ' // ' -}}
{%- endfor -%}
{{- '\\n' + (messages | map(attribute='role') | unique | join(',')) -}}
{{- '\\n' + (messages | selectattr('role', 'equalto', 'user') | list | length | string) + ' from the user' -}}
{%- for key, value in {'a': 1, 'b': [true, none, 1.5, 'é<&>\\'"']}.items() %}
{{ key }}={{ value | tojson }}
{%- endfor %}
{%- set words = messages[-1].content.split() %}

{{ words[0] }}|{{ words[-1] }}|{{ words | length }}|{{ messages[-1].content[:5] }}|{{ (words | first).capitalize() }}
{%- if add_generation_prompt is true %}

{{ 'ASSISTANT'.lower() }}:{% endif %}"""

WHITESPACE = """{# A comment line of its own #}
{% for message in messages %}
    {% if message.role in ['user', 'system'] %}
    [{{ message.role }}]
        {{ message.content }}
    {% elif message.role not in ('tool',) %}
    [answer]  
{{ message.content -}}
    {% endif %}

{% endfor %}
{%+ if add_generation_prompt %}
  [answer]
{% endif +%}
end
"""

SYS = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hello, who are you?"}
ME = {"role": "assistant", "content": "  A farm hand.  "}
MORE = {"role": "user", "content": "  What is 2 + 2?\n"}
TOOL = {"type": "function", "function": {
    "name": "add", "description": "Adds two numbers <a> & <b>.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                   "required": ["a", "b"]}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": 2, "note": "2 + 2 < 5, é"}}}]}

# name, template, messages, and what differs from add_generation_prompt=True, "<s>", "</s>"
CHATS = [
    ("chatml default system", CHATML, [HI], {}),
    ("chatml system", CHATML, [SYS, HI, ME, MORE], {}),
    ("chatml no generation prompt", CHATML, [SYS, HI, ME], {"add_generation_prompt": False}),
    ("chatml tool calls", CHATML, [MORE, CALL, {"role": "tool", "content": "4"}, {"role": "tool", "content": "5"}], {}),
    ("chatml plain", CHATML_PLAIN, [SYS, HI, ME, MORE], {}),
    ("llama-2 system", LLAMA2, [SYS, HI, ME, MORE], {}),
    ("llama-2 no system", LLAMA2, [MORE], {}),
    ("llama-2 roles must alternate", LLAMA2, [HI, HI], {}),
    ("llama-3", LLAMA3, [SYS, HI, ME, MORE], {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    ("llama-3.1 date", LLAMA31, [SYS, HI], {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    ("llama-3.1 given date, tools", LLAMA31, [HI, ME, MORE],
     {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "kwargs": {"date_string": "01 Jan 2026"},
      "tools": [TOOL]}),
    ("mistral system before the last question", MISTRAL, [SYS, HI, ME, MORE], {}),
    ("mistral unknown role", MISTRAL, [HI, {"role": "critic", "content": "Hm."}], {}),
    ("zephyr line breaks", ZEPHYR, [SYS, HI, ME, MORE], {}),
    ("zephyr no generation prompt", ZEPHYR, [HI, ME], {"add_generation_prompt": False}),
    ("phi-3", PHI3, [SYS, HI, ME, MORE], {"eos_token": "<|endoftext|>"}),
    ("phi-3 no generation prompt", PHI3, [HI, ME], {"eos_token": "<|endoftext|>", "add_generation_prompt": False}),
    ("gemma", GEMMA, [HI, ME, MORE], {"bos_token": "<bos>", "eos_token": "<eos>"}),
    ("gemma refuses a system message", GEMMA, [SYS, HI], {"bos_token": "<bos>", "eos_token": "<eos>"}),
    ("thinking", THINKING, [HI, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nA hand."}, MORE,
                            {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"}],
     {"add_generation_prompt": False}),
    ("thinking off, content parts", THINKING,
     [{"role": "user", "content": [{"type": "text", "text": "Look at"}, {"type": "image", "image": "x.png"},
                                   {"type": "text", "text": " this."}]}], {"kwargs": {"enable_thinking": False}}),
    ("generation block", GENERATION, [SYS, HI, ME, MORE], {}),
    ("string methods and filters", METHODS,
     [SYS, {**HI, "name": "ada lovelace"}, ME, {"role": "user", "content": "tabs\tand  two spaces "}], {}),
    ("whitespace control", WHITESPACE, [SYS, HI, ME, MORE], {}),
    ("whitespace control, no generation prompt", WHITESPACE, [HI, ME], {"add_generation_prompt": False}),
    ("no template knowledge of unicode", CHATML_PLAIN, [{"role": "user", "content": "naïve → 東京 \U0001f404\n\n"}], {}),
]

NOW = datetime(2026, 11, 21, 9, 5, 7)


def make_chats():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return NOW

    chat_template_utils.datetime = Clock
    cases = []
    for name, template, messages, other in CHATS:
        case = {
            "name": name, "template": template, "messages": messages,
            "add_generation_prompt": other.get("add_generation_prompt", True),
            "bos_token": other.get("bos_token", "<s>"), "eos_token": other.get("eos_token", "</s>"),
            "tools": other.get("tools"), "kwargs": other.get("kwargs", {}),
        }
        tok = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()), bos_token=case["bos_token"], eos_token=case["eos_token"])
        try:
            case["rendered"] = tok.apply_chat_template(
                messages, chat_template=template, tools=case["tools"], tokenize=False,
                add_generation_prompt=case["add_generation_prompt"], **case["kwargs"])
        except Exception as e:
            assert type(e).__name__ == "TemplateError", (name, e)
            case["error"] = str(e)
        cases.append(case)
    folder = HERE / "chat"
    folder.mkdir(exist_ok=True)
    write_json(folder / "cases.json", {
        "notes": "What transformers renders with apply_chat_template(tokenize=False): a Jinja environment with "
                 "trim_blocks, lstrip_blocks and loop controls; tools and documents are none when not given, so they "
                 "are defined; strftime_now sees the time in now. A case has rendered, or error where the template "
                 "calls raise_exception.",
        "now": NOW.isoformat(), "cases": cases})
    print(f"chat: {len(cases)} cases", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cases", nargs="*", help="names of cases, or chat; all by default")
    args = p.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for name in args.cases or [*CASES, "chat"]:
        make_chats() if name == "chat" else make_case(name)


if __name__ == "__main__":
    main()
