#!/usr/bin/env python3
"""Makes the tiny demo model in this folder: corpus, tokenizer, training, evaluation, export.

    python models/tiny/train.py train     # writes checkpoints to --work
    python models/tiny/train.py export    # writes the model's files beside this script
    python models/tiny/train.py eval      # greedy decoding with the exported files

Everything is generated here from a fixed seed; there is no outside data. The model is a Llama of
2.5 million parameters that does small exact tasks (copy, reverse, sort, count, add ...), so that a
reader of farm's output can see at a glance whether an answer is right.

Two forms of prompt are trained, each with the same instructions:

    raw    <s>reverse: c a t =>            ->  " t a c<|end|>"
    chat   <s><|user|>reverse: c a t<|end|><|assistant|>   ->  "t a c<|end|>"

An item is held out of training when the SHA-256 of its task and arguments falls in one twentieth of
the range. The closed tables (days, months, facts) have nothing to hold out: their accuracy is
on items that were trained on, in raw and in chat form.
"""

import argparse
import hashlib
import json
import math
import os
import random
import string
import tempfile
import time
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20261121

# --------------------------------------------------------------------------------------------------
# The tokenizer's special tokens and the chat template
# --------------------------------------------------------------------------------------------------

PAD, BOS, END, SYSTEM, USER, ASSISTANT = (
    "<pad>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
SPECIALS = [PAD, BOS, END, SYSTEM, USER, ASSISTANT]
VOCAB = 512

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('unknown role: ' + message['role']) }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)

# --------------------------------------------------------------------------------------------------
# The tasks. Each takes a random generator and whether training is past LATE, and returns
# (key, [phrasings], answer).
# --------------------------------------------------------------------------------------------------

WORDS = """apple river stone lamp green water house night light bread chair table paper glass wind
snow rain cloud field grass horse tiger mouse sheep eagle ocean beach hill forest leaf flower
garden street bridge train plane wheel clock phone letter book pencil music piano drum song dance
coffee sugar salt honey lemon orange grape peach onion carrot silver gold iron copper wood cotton
king queen child friend doctor farmer baker pilot north south east west spring summer autumn winter
red blue black white yellow small large happy quiet quick slow warm cold bright dark one two three""".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = ("January February March April May June July August September October November "
          "December").split()

FACTS = [
    ("what is the colour of the sky?", "The sky is blue."),
    ("what is the colour of grass?", "Grass is green."),
    ("what is the colour of snow?", "Snow is white."),
    ("what is the colour of coal?", "Coal is black."),
    ("what is the colour of a lemon?", "A lemon is yellow."),
    ("what is the colour of blood?", "Blood is red."),
    ("what is the capital of France?", "The capital of France is Paris."),
    ("what is the capital of Italy?", "The capital of Italy is Rome."),
    ("what is the capital of Spain?", "The capital of Spain is Madrid."),
    ("what is the capital of Germany?", "The capital of Germany is Berlin."),
    ("what is the capital of Egypt?", "The capital of Egypt is Cairo."),
    ("what is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("what is the capital of Lebanon?", "The capital of Lebanon is Beirut."),
    ("what does a cow eat?", "A cow eats grass."),
    ("what does a bee make?", "A bee makes honey."),
    ("what does a baker make?", "A baker makes bread."),
    ("how many days are in a week?", "A week has 7 days."),
    ("how many months are in a year?", "A year has 12 months."),
    ("how many legs has a spider?", "A spider has 8 legs."),
    ("how many legs has a dog?", "A dog has 4 legs."),
    ("how many minutes are in an hour?", "An hour has 60 minutes."),
    ("where does a fish live?", "A fish lives in water."),
    ("where does a bird sleep?", "A bird sleeps in a nest."),
    ("what is the opposite of hot?", "The opposite of hot is cold."),
    ("what is the opposite of big?", "The opposite of big is small."),
    ("what is the opposite of day?", "The opposite of day is night."),
    ("who are you?", "I am a tiny model that ships with farm."),
    ("what can you do?", "I copy, reverse, sort, count and add."),
    ("hello", "Hello! Ask me to reverse, sort, count or add."),
]


def letters(rng, low, high, distinct=False):
    n = rng.randint(low, high)
    if distinct:
        return rng.sample(string.ascii_lowercase, n)
    return [rng.choice(string.ascii_lowercase) for _ in range(n)]


def task_copy(rng, late):
    if rng.random() < 0.7:
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 6)))
    elif rng.random() < 0.5:
        text = " ".join(letters(rng, 3, 9))
    else:
        text = " ".join("".join(letters(rng, 2, 6)) for _ in range(rng.randint(1, 3)))
    return text, [f"copy: {text}", f"repeat: {text}"], text


def task_reverse(rng, late):
    x = letters(rng, 3, 8)
    text = " ".join(x)
    return text, [f"reverse: {text}", f"reverse the letters: {text}"], " ".join(reversed(x))


def task_sort(rng, late):
    x = letters(rng, 3, 7, distinct=True)
    text = " ".join(x)
    return text, [f"sort: {text}", f"sort the letters: {text}"], " ".join(sorted(x))


def task_upper(rng, late):
    x = letters(rng, 2, 8)
    text = " ".join(x)
    return text, [f"uppercase: {text}", f"write in capitals: {text}"], text.upper()


def task_first(rng, late):
    x = letters(rng, 2, 8)
    text = " ".join(x)
    return text, [f"first letter of: {text}", f"first: {text}"], x[0]


def task_last(rng, late):
    x = letters(rng, 2, 8)
    text = " ".join(x)
    return text, [f"last letter of: {text}", f"last: {text}"], x[-1]


def task_length(rng, late):
    x = letters(rng, 1, 9)
    text = " ".join(x)
    return text, [f"how many letters: {text}", f"length: {text}"], str(len(x))


def task_count_up(rng, late):
    a = rng.randint(0, 88 if late else 40)
    b = a + rng.randint(2, 11)
    text = " ".join(str(i) for i in range(a, b + 1))
    return f"{a} {b}", [f"count from {a} to {b}", f"count up from {a} to {b}"], text


def task_count_down(rng, late):
    b = rng.randint(0, 88 if late else 40)
    a = b + rng.randint(2, 11)
    text = " ".join(str(i) for i in range(a, b - 1, -1))
    return f"{a} {b}", [f"count down from {a} to {b}"], text


def task_add(rng, late):
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return f"{a} {b}", [f"add: {a} + {b}", f"what is {a} + {b}?"], str(a + b)


def task_next(rng, late):
    names, what = rng.choice([(DAYS, "day"), (MONTHS, "month")])
    i = rng.randrange(len(names))
    if rng.random() < 0.5:
        return f"after {names[i]}", [f"what {what} comes after {names[i]}?"], names[(i + 1) % len(names)]
    return f"before {names[i]}", [f"what {what} comes before {names[i]}?"], names[i - 1]


def task_facts(rng, late):
    question, answer = rng.choice(FACTS)
    return question, [question], answer


# The mix changes once, at this step: by then letters are learned, while copying and counting are not.
LATE = 1750

# name: (generator, share of the early mix, share of the late mix, closed table?)
TASKS = {
    "copy": (task_copy, 1.0, 2.5, False),
    "reverse": (task_reverse, 2.0, 1.5, False),
    "sort": (task_sort, 2.0, 2.0, False),
    "upper": (task_upper, 0.7, 0.8, False),
    "first": (task_first, 0.5, 0.3, False),
    "last": (task_last, 0.5, 0.3, False),
    "length": (task_length, 1.0, 0.5, False),
    "count-up": (task_count_up, 0.8, 1.5, False),
    "count-down": (task_count_down, 0.8, 1.5, False),
    "add": (task_add, 4.0, 3.5, False),
    "next": (task_next, 0.4, 0.4, True),
    "facts": (task_facts, 0.6, 0.4, True),
}


def held_out(name, key):
    digest = hashlib.sha256(f"{name}|{key}".encode()).digest()
    return digest[0] * 256 + digest[1] < 65536 // 20


def item(rng, name, want_held_out, late=True):
    """Draws an item of one task from the training side or from the held-out side."""
    make, _, _, closed = TASKS[name]
    while True:
        key, phrasings, answer = make(rng, late)
        if closed or held_out(name, key) == want_held_out:
            return key, rng.choice(phrasings), answer


def as_raw(phrase, answer):
    """(prompt, answer) of the raw form."""
    return f"{BOS}{phrase} =>", f" {answer}{END}"


def as_chat(phrase, answer, system=None):
    """(prompt, answer) of the chat form: what the chat template renders."""
    head = f"{SYSTEM}{system}{END}" if system else ""
    return f"{BOS}{head}{USER}{phrase}{END}{ASSISTANT}", f"{answer}{END}"


SYSTEM_PROMPTS = ["You are a helpful assistant.", "Answer in one line.", "Be exact."]


def sample(rng, late=False):
    """One training sample: a list of (text, is_answer) pieces."""
    names = list(TASKS)
    weights = [TASKS[n][2 if late else 1] for n in names]

    def draw():
        return item(rng, rng.choices(names, weights)[0], False, late)[1:]

    form = rng.random()
    phrase, answer = draw()
    if form < 0.5:
        prompt, reply = as_raw(phrase, answer)
        return [(prompt, False), (reply, True)]
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.1 else None
    prompt, reply = as_chat(phrase, answer, system)
    pieces = [(prompt, False), (reply, True)]
    if form > (0.88 if late else 0.93):  # a second turn
        phrase, answer = draw()
        prompt, reply = as_chat(phrase, answer)
        pieces += [(prompt[len(BOS):], False), (reply, True)]
    return pieces


# --------------------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------------------

def build_tokenizer():
    """Byte-level BPE: 6 special tokens, the 256 bytes, merges learned on the corpus. A digit is a
    token of its own, with the space before it if there is one."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tok.decoder = decoders.ByteLevel()
    rng = random.Random(SEED)
    # The specials are put in front of the text by hand and are no part of what merges are learned on.
    corpus = []
    for _ in range(40000):
        text = "".join(t for t, _ in sample(rng))
        for s in SPECIALS:
            text = text.replace(s, "\n")
        corpus.extend(t for t in text.split("\n") if t)
    corpus += [f" {c}" for c in string.ascii_letters + string.digits] * 5000
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, show_progress=False, special_tokens=[AddedToken(s, special=True) for s in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(corpus, trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tok.token_to_id(BOS))])
    assert tok.get_vocab_size() == VOCAB
    for c in string.ascii_letters + string.digits:
        assert len(tok.encode(f" {c}", add_special_tokens=False).ids) == 1, c
    return tok


# --------------------------------------------------------------------------------------------------
# Model and batches
# --------------------------------------------------------------------------------------------------

def build_config():
    from transformers import LlamaConfig
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048,
        rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True, attention_bias=False,
        mlp_bias=False, hidden_act="silu", initializer_range=0.02,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)


def encode(tok, pieces):
    """Token ids and, for each, whether it is part of an answer."""
    ids, mask = [], []
    for text, is_answer in pieces:
        part = tok.encode(text, add_special_tokens=False).ids
        ids += part
        mask += [is_answer] * len(part)
    return ids, mask


def pad(rows):
    """Right-padded (ids, answer mask): causal attention keeps the padding out of what is scored."""
    import torch
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (a, b) in enumerate(rows):
        ids[i, :len(a)] = torch.tensor(a)
        mask[i, :len(b)] = torch.tensor(b)
    return ids, mask


def answer_logits(model, ids, mask):
    """Logits at the positions that predict an answer's token, and those tokens."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    at = mask[:, 1:]
    return model.lm_head(hidden[at]), ids[:, 1:][at], at


def exact_match(model, tok, name, form, count, seed):
    """Share of items whose every answer token (with the end) is the argmax given the right ones
    before it, which holds exactly when greedy decoding gives that answer."""
    import torch
    rng = random.Random(f"{seed}-{name}-{form}")
    rows = []
    for _ in range(count):
        _, phrase, answer = item(rng, name, True)
        p, r = (as_raw if form == "raw" else as_chat)(phrase, answer)
        rows.append(encode(tok, [(p, False), (r, True)]))
    rows.sort(key=lambda r: len(r[0]))
    right = 0
    with torch.no_grad():
        for i in range(0, len(rows), 64):
            ids, mask = pad(rows[i:i + 64])
            logits, want, at = answer_logits(model, ids, mask)
            ok = torch.ones_like(at)
            ok[at] = logits.argmax(-1) == want
            right += int(ok.all(1).sum())
    return right / len(rows)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

def learning_rate(step, args):
    """Warm-up, a flat stretch, and a linear fall to zero over the last --decay steps."""
    lr = args.lr * min(1.0, (step + 1) / args.warmup)
    left = args.steps - step
    return lr * min(1.0, left / args.decay)


def train(args):
    import torch.multiprocessing as mp
    if args.procs == 1:
        train_rank(0, args)
    else:
        mp.spawn(train_rank, (args,), nprocs=args.procs)


def train_rank(rank, args):
    """One of --procs data-parallel processes: each takes a share of every step's samples, gradients
    are summed. (Processes, not threads: the steps are too small for threads to pay.)"""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    if args.procs > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{args.port}", rank=rank, world_size=args.procs)
    tok = build_tokenizer()
    model = LlamaForCausalLM(build_config())
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
                            lr=args.lr, betas=(0.9, 0.98))
    if rank == 0:
        tok.save(str(work / "tokenizer.json"))
        print("parameters:", sum(p.numel() for p in model.parameters()), flush=True)
    first = 0
    checkpoint = work / "checkpoint.pt"
    if args.resume:
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        first = state["step"]
        if rank == 0:
            print("resumed at step", first, flush=True)

    def save(step):
        torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "step": step}, work / "checkpoint.tmp")
        os.replace(work / "checkpoint.tmp", checkpoint)

    began, seen, total = time.time(), 0, 0.0
    for step in range(first, args.steps):
        # Each step has a generator of its own, so a resumed run sees the same data.
        rng = random.Random(f"{SEED}-{step}")
        rows = sorted((encode(tok, sample(rng, step >= LATE)) for _ in range(args.batch)), key=lambda r: len(r[0]))
        parts = [pad(rows[i:i + args.batch // 8]) for i in range(0, args.batch, args.batch // 8)]
        scored = sum(int(m[:, 1:].sum()) for _, m in parts)
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, args)
        loss_sum = 0.0
        for ids, mask in parts[rank::args.procs]:
            logits, want, _ = answer_logits(model, ids, mask)
            loss = F.cross_entropy(logits, want, reduction="sum") / scored
            loss.backward()
            loss_sum += loss.item()
            seen += ids.numel() * args.procs
        if args.procs > 1:
            flat = torch.cat([p.grad.flatten() for p in model.parameters()] + [torch.tensor([loss_sum])])
            dist.all_reduce(flat)
            at = 0
            for p in model.parameters():
                p.grad = flat[at:at + p.numel()].view_as(p)
                at += p.numel()
            loss_sum = flat[-1].item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        total += loss_sum
        done = step + 1
        if done % 50 == 0:
            took = time.time() - began
            if rank == 0:
                print(f"step {done} loss {total / 50:.4f} {took / (done - first):.3f} s/step {seen / took:.0f} tok/s",
                      flush=True)
            total = 0.0
        if rank == 0 and (done % args.every == 0 or done == args.steps):
            save(done)
            model.eval()
            scores = {n: min(exact_match(model, tok, n, f, 48, 1) for f in ("raw", "chat")) for n in TASKS}
            model.train()
            print(f"eval {done} " + " ".join(f"{n}={v:.2f}" for n, v in scores.items()), flush=True)


# --------------------------------------------------------------------------------------------------
# Export and evaluation of what was exported
# --------------------------------------------------------------------------------------------------

def export(args):
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    work, out = Path(args.work), Path(args.out)
    model = LlamaForCausalLM(build_config())
    model.load_state_dict(torch.load(work / "checkpoint.pt")["model"])
    model = model.to(torch.bfloat16)
    model.generation_config.bos_token_id = 1
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(out)
    tok = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"), bos_token=BOS, eos_token=END, pad_token=PAD,
        model_max_length=2048, clean_up_tokenization_spaces=False)
    tok.chat_template = CHAT_TEMPLATE
    tok.save_pretrained(out)
    # One file holds the template, in the spelling that every reader knows.
    template = out / "chat_template.jinja"
    if template.exists():
        template.unlink()
    (out / "model.safetensors").chmod(0o644)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = CHAT_TEMPLATE
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def evaluate(args):
    """Greedy generation with the exported bf16 weights, computed in f32."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    tok = AutoTokenizer.from_pretrained(args.out)
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    forms = ("raw", "chat", "system", "second turn")
    groups = defaultdict(list)  # by the prompt's length, so that no batch needs padding
    for name in TASKS:
        for form in forms:
            rng = random.Random(f"final-{name}-{form}")
            for _ in range(args.items):
                _, phrase, answer = item(rng, name, True)
                if form == "raw":
                    ids = tok(f"{phrase} =>")["input_ids"]
                else:
                    messages = [{"role": "user", "content": phrase}]
                    if form == "system":
                        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
                    elif form == "second turn":
                        _, p, a = item(rng, rng.choice(list(TASKS)), True)
                        messages = [{"role": "user", "content": p}, {"role": "assistant", "content": a}] + messages
                    text = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                    ids = tok(text, add_special_tokens=False)["input_ids"]
                groups[len(ids)].append((name, form, phrase, ids, f" {answer}" if form == "raw" else answer))
    right = defaultdict(int)
    for _, group in sorted(groups.items()):
        ids = torch.tensor([g[3] for g in group])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48)
        for row, (name, form, phrase, _, answer) in zip(out[:, ids.shape[1]:].tolist(), group):
            text = tok.decode(row, skip_special_tokens=True)
            ok = text == answer and 2 in row
            right[name, form] += ok
            if args.show and not ok:
                print(f"{name}/{form}: {phrase!r} gave {text!r}, not {answer!r}")
    print("| task | " + " | ".join(forms) + " |")
    print("|---|" + "---:|" * len(forms))
    for name in TASKS:
        print(f"| {name} | " + " | ".join(f"{100 * right[name, f] / args.items:.1f} %" for f in forms) + " |")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["train", "export", "eval"])
    p.add_argument("--work", default=os.path.join(tempfile.gettempdir(), "farm-tiny"), help="folder for checkpoints")
    p.add_argument("--out", default=str(HERE), help="folder of the exported model")
    p.add_argument("--steps", type=int, default=2600)
    p.add_argument("--decay", type=int, default=850, help="steps of falling learning rate at the end")
    p.add_argument("--warmup", type=int, default=200)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    p.add_argument("--procs", type=int, default=2, help="data-parallel processes")
    p.add_argument("--port", type=int, default=29471, help="local port where the processes meet")
    p.add_argument("--resume", action="store_true")
    p.add_argument("--show", action="store_true", help="eval: print what is wrong")
    p.add_argument("--items", type=int, default=200, help="eval: items per task and form")
    args = p.parse_args()
    {"train": train, "export": export, "eval": evaluate}[args.what](args)


if __name__ == "__main__":
    main()
