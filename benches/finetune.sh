#!/usr/bin/env bash
# LoRA fine-tuning of a random 110M Llama by farm, PEFT and candle in turn: tokens/s, peak memory.
#
#     benches/finetune.sh [FOLDER]
#
#     FARM_BIN=target/release/farm PYTHON=python3 (with torch, transformers, peft) THREADS=2
#     ROUNDS=3 STEPS=6 BATCH=4 LENGTH=512 PEERS="farm torch candle" DTYPES="f32 bf16"
#
# Rank 16 on all linear layers, the same records for all, no padding, AdamW. A run's rate is the median
# of its steps after the first; a row of docs/PERFORMANCE.md has the best of all rounds, the most memory
# (resident, whole process, loading included), and farm's figures relative to the row's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-${TMPDIR:-/tmp}/farm-finetune}
farm=${FARM_BIN:-target/release/farm}
python=${PYTHON:-python3}
threads=${THREADS:-2} rounds=${ROUNDS:-3} steps=${STEPS:-6} batch=${BATCH:-4} length=${LENGTH:-512}
peers=${PEERS:-farm torch candle}
dtypes=${DTYPES:-f32 bf16}
train=$folder/train.jsonl
mkdir -p "$folder"
export OMP_NUM_THREADS=$threads RAYON_NUM_THREADS=$threads TOKENIZERS_PARALLELISM=false

# candle: the bench's executable. Without arguments it makes the models.
candle=$(cargo bench --bench candle_finetune --no-run --message-format=json |
    sed -n 's/.*"name":"candle_finetune".*"executable":"\([^"]*\)".*/\1/p')
"$candle" > /dev/null
models=target/bench-models/110m
for dtype in f32 bf16; do
    cp tests/golden/llama_bf16/tokenizer{,_config}.json "$models-$dtype/"
done

# A letter is a token or less, so LENGTH words of four are enough to fill a sequence.
"$python" - "$((steps * batch))" "$length" > "$train" <<'PY'
import json, random, sys
records, length = map(int, sys.argv[1:])
rng = random.Random(1)
word = lambda: "".join(rng.choices("bcfgjkmpquvwxyz", k=4))
for _ in range(records):
    print(json.dumps({"text": " ".join(word() for _ in range(length))}))
PY

# measured COMMAND...: runs it, its output in $folder/log, and prints its peak resident MiB.
measured() {
    "$python" -c '
import resource, subprocess, sys
with open(sys.argv[1], "w") as log:
    code = subprocess.run(sys.argv[2:], stdout=log, stderr=subprocess.STDOUT).returncode
if code:
    sys.exit(open(sys.argv[1]).read())
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)' "$folder/log" "$@"
}

# median: of the numbers on standard input but the first.
median() {
    tail -n +2 | sort -g | awk '{x[NR] = $1} END {print (x[int((NR + 1) / 2)] + x[int(NR / 2) + 1]) / 2}'
}

# run_farm DTYPE RECOMPUTE: "tokens/s MiB". The other run_… print the same.
run_farm() {
    local memory
    rm -rf "$folder/adapter"
    memory=$(FARM_THREADS=$threads measured "$farm" finetune --model "$models-$1" --train "$train" \
        --adapter-out "$folder/adapter" --no-stage --dtype "$1" --recompute "$2" \
        --lora-r 16 --lora-alpha 32 --max-steps "$steps" --batch-size "$batch" --micro-batch-size "$batch" \
        --max-seq-len "$length" --save-steps 0)
    echo "$(cat "$folder/adapter/metrics.jsonl" |
        sed -n 's/.*"tokens_per_second":\([0-9.e+-]*\).*/\1/p' | median) $memory"
}

run_torch() {
    local memory checkpointing=()
    if [[ $2 == full ]]; then checkpointing=(--checkpointing); fi
    memory=$(measured "$python" benches/peft_finetune.py "$models-$1" "$train" --dtype "$1" --threads "$threads" \
        --steps "$steps" --batch "$batch" --length "$length" "${checkpointing[@]}")
    echo "$(sed -n 's|^step .* tokens/s ||p' "$folder/log" | median) $memory"
}

run_candle() {
    local memory
    memory=$(measured "$candle" "$models-$1" "$train" "$1" "$steps" "$batch" "$length")
    echo "$(sed -n 's|^step .* tokens/s ||p' "$folder/log" | median) $memory"
}

rows=()
for dtype in $dtypes; do
    for recompute in none full; do
        for peer in $peers; do
            # candle keeps everything.
            if [[ $peer != candle || $recompute == none ]]; then rows+=("$peer $dtype $recompute"); fi
        done
    done
done
declare -A rate memory
for ((round = 1; round <= rounds; round++)); do
    for row in "${rows[@]}"; do
        read -r peer dtype recompute <<< "$row"
        measure=$("run_$peer" "$dtype" "$recompute")
        read -r now_rate now_memory <<< "$measure"
        echo "round $round, $row: $now_rate tokens/s, $now_memory MiB" >&2
        rate[$row]=$(awk -v a="${rate[$row]:-0}" -v b="$now_rate" 'BEGIN {print a > b ? a : b}')
        memory[$row]=$((now_memory > ${memory[$row]:-0} ? now_memory : memory[$row]))
    done
done

echo "| | weights | recompute | tokens/s | farm's speed to it | peak, MiB | farm's memory to it |"
echo "|---|---|---|---:|---:|---:|---:|"
for row in "${rows[@]}"; do
    read -r peer dtype recompute <<< "$row"
    own="farm $dtype $recompute"
    awk -v peer="$peer" -v dtype="$dtype" -v recompute="$recompute" -v rate="${rate[$row]}" \
        -v memory="${memory[$row]}" -v own_rate="${rate[$own]:-0}" -v own_memory="${memory[$own]:-0}" 'BEGIN {
        printf "| %s | %s | %s | %.0f | %.2f | %d | %.2f |\n",
            peer, dtype, recompute, rate, own_rate / rate, memory, own_memory / memory}'
done
