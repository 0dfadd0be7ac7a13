#!/usr/bin/env python3
"""Writes the reference models and answers in this folder with Hugging Face transformers.

    python tests/golden/generate.py            # everything
    python tests/golden/generate.py llama_gqa  # one case
    python tests/golden/generate.py chat       # the chat templates

The committed output was made with Python 3.11, torch 2.15.0, transformers 5.23.0, tokenizers 0.23.3,
safetensors 0.8.0 and jinja2 3.1.6 on an AVX-512 CPU. Another version or CPU may move the last bits of
the floating-point values; the greedy tokens have a margin (see MARGIN) that survives that.

Each case folder holds a small random Llama as a user would have it (config.json, safetensors, tokenizer,
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

Everything is computed in f32 on the CPU with attn_implementation="eager" and use_cache=False: one
forward over the whole sequence for every new token, with a fresh rotary embedding each time. For
bf16 and f16 cases the stored weights are upcast to f32 first.
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
}


def random_weights(model, seed):
    """Weights large enough for varied answers, norms spread around one, biases non-zero."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=gen)
            if "norm" in name:
                p.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.2 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                p.copy_(0.3 * noise)
            else:
                p.copy_(0.15 * noise)


def classic_config(path, wanted):
    """Rewrites what transformers 5 saved into the spelling of most files in the wild."""
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    if "head_dim" not in wanted:  # older files leave it to hidden_size / num_attention_heads
        config.pop("head_dim", None)
    config["rope_theta"] = wanted["rope_theta"]
    config["rope_scaling"] = wanted.get("rope_scaling")
    config["torch_dtype"] = config.pop("dtype", "float32")
    write_json(path, dict(sorted(config.items())))


def write_model(folder, name, seed):
    from transformers import LlamaConfig, LlamaForCausalLM
    changes, how = CASES[name]
    wanted = {**BASE, **changes}
    # transformers edits the dictionaries it is given.
    model = LlamaForCausalLM(LlamaConfig(**json.loads(json.dumps(wanted))))
    random_weights(model, seed)
    model = model.to(getattr(torch, how.get("dtype", "float32")))
    for old in folder.glob("model*"):
        old.unlink()
    model.save_pretrained(folder, max_shard_size=how.get("shard", "1GB"))
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    if not how.get("modern"):
        classic_config(folder / "config.json", wanted)


# --------------------------------------------------------------------------------------------------
# References
# --------------------------------------------------------------------------------------------------

def forward(model, ids):
    """Logits (positions x vocabulary) of one whole sequence, free of any state of earlier calls."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
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
    """Greedy tokens as generate() gives them: prefill, then one token at a time on the KV cache."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    ids = torch.tensor([ids])
    out, cache, step = [], None, ids
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            result = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            out.append(result.logits[0, -1].argmax().item())
            step = torch.tensor([[out[-1]]])
    return out


def f32(values):
    """Shortest decimals that read back to the same f32."""
    return [float(np.format_float_positional(np.float32(v), unique=True, trim="0")) for v in values]


def references(folder, tok, name):
    from transformers import LlamaForCausalLM
    _, how = CASES[name]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    smallest, prompts = math.inf, []
    for i, text in enumerate(PROMPTS):
        ids = tok(text)["input_ids"]
        new, margin = greedy(model, ids)
        smallest = min(smallest, margin)
        if smallest < MARGIN or len(set(new)) < 8:
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
        golden = references(folder, tok, name)
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
