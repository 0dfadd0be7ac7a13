#!/usr/bin/env bash
# How long a model takes to load, and the memory of ranks that share one copy of it.
#
#     benches/load.sh [FOLDER]        RANKS=4, FARM_BIN=target/release/farm, STAGE_DIR=/dev/shm
#
# Makes models of half a billion parameters in FOLDER (2.5 GB, kept), starts RANKS ranks by
# mpirun on this node for each form and way, and prints a row of docs/PERFORMANCE.md for each:
# seconds from the start to rank 0's first token, cold (the model's files dropped from the page
# cache) and warm; then each rank's RSS and PSS from /proc/PID/smaps_rollup while they generate.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-${TMPDIR:-/tmp}/farm-load}
ranks=${RANKS:-4}
farm=${FARM_BIN:-target/release/farm}
stage_dir=${STAGE_DIR:-/dev/shm}
tokenizer=$PWD/tests/golden/llama_bf16
mkdir -p "$folder"
work=$(mktemp -d "$folder/work.XXXXXX")
launched=
# mpirun passes the signal on to its ranks.
stop() {
    [[ -z $launched ]] || { kill -TERM "$launched" && wait "$launched"; } 2>/dev/null || true
    launched=
}
trap 'stop; rm -rf "$work"' EXIT

for _ in {1..64}; do echo "Once upon a time there was a farm"; done > "$work/prompts.txt"
mpirun=(mpirun -n "$ranks" --bind-to none --oversubscribe)
if ((EUID == 0)); then
    mpirun+=(--allow-run-as-root)
fi

# drop FILE...: out of the page cache.
drop() {
    python3 -c '
import os, sys
for name in sys.argv[1:]:
    file = os.open(name, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)' "$@"
}

# event NAME FIELD: that of rank 0's first such event.
event() {
    sed -n "/\"rank\":0,.*\"event\":\"$1\"/{s/.*\"$2\":\([0-9.e+-]*\).*/\1/p;q}" \
        "$work/run/events.jsonl" 2>/dev/null
}

# start FLAGS...: starts the ranks and returns when rank 0 has its first token.
start() {
    rm -rf "$work/run"
    "${mpirun[@]}" "$farm" generate --prompts-file "$work/prompts.txt" --tokenizer "$tokenizer" \
        --output "$work/out.jsonl" --run-dir "$work/run" --stage-dir "$stage_dir" --ignore-eos \
        --max-new-tokens 200 --max-seq-len 256 --max-batch-size 4 --progress none "$@" \
        > "$work/log" 2>&1 &
    launched=$!
    until [[ -n $(event first_token at_seconds) ]]; do
        kill -0 "$launched" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
        sleep 0.1
    done
}

# pids: the ranks, mpirun's children or grandchildren.
pids() {
    pgrep -f "^$farm generate .*--run-dir $work/run" || true
}

# field NAME UNIT PID: of smaps_rollup, MiB.
field() {
    awk -v name="$1:" '$1 == name {printf "%.0f", $2 / 1024}' "/proc/$2/smaps_rollup"
}

# memory: the ranks' mean RSS, PSS and its anonymous part, once all have made steps, and the sum
# of PSS.
memory() {
    sleep "${SETTLE:-15}"
    local pid count=0 rss=0 pss=0 anon=0
    for pid in $(pids); do
        count=$((count + 1))
        rss=$((rss + $(field Rss "$pid")))
        pss=$((pss + $(field Pss "$pid")))
        anon=$((anon + $(field Pss_Anon "$pid")))
    done
    ((count == ranks)) || { echo "found $count ranks" >&2; exit 1; }
    echo "$((rss / count)) | $((pss / count)) | $((anon / count)) | $pss"
}

# row NAME MODEL FLAGS...
row() {
    local name=$1 model=$2 cold cold_stage warm warm_stage load
    shift 2
    drop "$model"/model.*
    start --model "$model" "$@"
    cold=$(event first_token at_seconds) cold_stage=$(event stage stage_seconds)
    stop
    start --model "$model" "$@"
    warm=$(event first_token at_seconds) warm_stage=$(event stage stage_seconds)
    load=$(event load load_seconds)
    local owned
    owned=$(event load owned_weight_bytes)
    printf '| %s | %.1f (%.1f) | %.1f (%.1f) | %.2f | %.0f | %s |\n' "$name" "$cold" "$cold_stage" \
        "$warm" "$warm_stage" "$load" "$(awk "BEGIN {print $owned / 1048576}")" "$(memory)"
    stop
}

for form in safetensors gguf-f16 gguf-q8_0; do
    [[ -e $folder/$form ]] || python3 benches/load_model.py "$folder/$form" "$form"
done
echo "| model, way | cold, s (staging) | warm, s (staging) | load, s | own weights, MiB | RSS | PSS | anonymous | PSS of all |"
echo "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
for form in ${FORMS:-safetensors gguf-f16 gguf-q8_0}; do
    row "$form, staged" "$folder/$form"
    row "$form, in place" "$folder/$form" --no-stage
done
row "safetensors, \`--quantize q8_0\`" "$folder/safetensors" --quantize q8_0
row "safetensors, \`--quantize q4_k\`" "$folder/safetensors" --quantize q4_k
row "safetensors, \`--tensor-parallel $ranks\`" "$folder/safetensors" --tensor-parallel "$ranks"
row "gguf-q8_0, \`--tensor-parallel $ranks\`" "$folder/gguf-q8_0" --tensor-parallel "$ranks"
