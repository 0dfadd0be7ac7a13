#!/usr/bin/env bash
# What `make demo-finetune` shows: the small model learns, on two ranks and in minutes, a task that it does not know,
# saying words in reverse order; its answers to held-out items before and after, and the loss on the way.
#
#   .ci/demo-finetune.sh target/release/farm [RANKS]
#
# DEMO_OUT=FOLDER keeps the adapter and all answers there. Exit: 0 if more than 95 of 100 answers are right after it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
farm=$1 ranks=${2:-2} shown=5
held_out=prompts/finetune/heldout.jsonl
out=${DEMO_OUT:-}
if [ -z "$out" ]; then
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
fi
mkdir -p "$out"
# Open MPI refuses root and more ranks than cores unless told; both are normal for a demo, in a container say.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1

on_ranks() {
    echo "\$ mpirun -n $ranks $*"
    mpirun -n "$ranks" --bind-to none "$@"
}

# answer NAME ARG…: the held-out items' answers, to $out/NAME.jsonl
answer() {
    local name=$1; shift
    on_ranks "$farm" --model models/tiny --prompts-file $held_out --output "$out/$name.jsonl" --max-new-tokens 40 \
        --run-dir "$out/$name" --quiet "$@"
}

# exact FILE: how many answers are the held-out completion, to the letter. Plain awk: Python or jq may be absent.
exact() { compared "$1" | grep -c '^=' || true; }

# One line an item: "=" or "x" for right or wrong, prompt, answer, apart by tabs.
compared() {
    awk '
        function field(name,    value) {
            if (!match($0, "\"" name "\": *\"([^\"\\\\]|\\\\.)*\"")) return ""
            value = substr($0, RSTART + length(name) + 3, RLENGTH - length(name) - 4)
            sub(/^ *"/, "", value)
            return value
        }
        NR == FNR { completion[NR] = field("completion"); prompt[NR] = field("prompt"); next }
        { text = field("text"); print (text == completion[FNR] ? "=" : "x") "\t" prompt[FNR] "\t" text }
    ' $held_out "$1"
}

answer before --temperature 0
# The learning rate is high and the batch large, for a model of 1.2 million values and half a million tokens.
on_ranks "$farm" finetune --model models/tiny --train prompts/finetune/train.jsonl --adapter-out "$out/adapter" \
    --learning-rate 5e-3 --warmup-ratio 0.05 --epochs 4 --batch-size 32 --micro-batch-size 16 --val-fraction 0.02 \
    --eval-steps 50
answer after --temperature 0 --adapter "$out/adapter"
echo
"$farm" report "$out/adapter" || true
for when in before after; do
    printf '\n%s:\n' "$when"
    compared "$out/$when.jsonl" | head -n "$shown" | while IFS=$'\t' read -r mark prompt text; do
        printf '  %s %s%s\n' "$mark" "$prompt" "$text"
    done
done
before=$(exact "$out/before.jsonl") after=$(exact "$out/after.jsonl") all=$(wc -l < $held_out)
printf '\n%s of %s held-out items answered to the letter before, %s after\n' "$before" "$all" "$after"
[ $((after * 100)) -gt $((all * 95)) ]
