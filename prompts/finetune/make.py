#!/usr/bin/env python3
"""Writes train.jsonl and heldout.jsonl beside this script: a task that models/tiny does not know.

    python prompts/finetune/make.py

Two to five different words of the model's own corpus are to be said in reverse order. The model knows the words and
how to reverse letters; asked for this it garbles the words. No item is in both files.
"""

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "models" / "tiny"))
from train import WORDS  # noqa: E402

TRAIN, HELD_OUT = 3200, 200


def main():
    rng = random.Random(5)
    items = {}
    while len(items) < TRAIN + HELD_OUT:
        words = rng.sample(WORDS, rng.randint(2, 5))
        items[f"reverse the words: {' '.join(words)} =>"] = " " + " ".join(reversed(words))
    lines = [json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in items.items()]
    (HERE / "heldout.jsonl").write_text("".join(lines[:HELD_OUT]))
    (HERE / "train.jsonl").write_text("".join(lines[HELD_OUT:]))


if __name__ == "__main__":
    main()
