#!/usr/bin/env bash
# What farm does on this machine's GPU, in one table: golden tests, parity with the CPU, speed beside the card's limits
# and beside HF transformers, tensor parallelism on one card, LoRA training.
#
#   make cuda && tests/gpu.sh                  everything
#   tests/gpu.sh goldens parity 7b             some of: limits goldens parity tp sanitizer 1.1b 7b 13b transformers lora
#   tests/gpu.sh build                         on a machine without a GPU: what to carry, into target/gpu/
#   DEVICE=emulator tests/gpu.sh dry           the script itself, on the tests' emulator at tiny sizes
#
# Needs no cargo on the machine with the GPU: it takes what is in target/gpu/, else
#
#   FARM_BIN           the binary (target/release/farm)
#   FARM_DEVICE_BENCH  the executable of benches/device.rs: measures the limits, makes models and prompts
#   FARM_GOLDENS       the executable of tests/golden.rs; BUILT_AT: the checkout's path on the machine that built it
#
# Other settings: GPU_DIR (models and results, 45 GB for all; /tmp/farm-gpu), STEP_SECONDS (500, for a single command),
# PYTHON (python3). A step that fails or takes too long has its row, and the next one goes on.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

device=${DEVICE:-cuda}
dir=${GPU_DIR:-/tmp/farm-gpu}
seconds=${STEP_SECONDS:-500}
python=${PYTHON:-python3}
tokenizer=$PWD/tests/golden/llama_bf16
rows=$dir/rows
# Sizes; smaller in a dry run.
prefill_prompts=64 prefill_tokens=1024 decode_tokens=128 decode_new=256 batches=(1 32 128 256)
lora_steps=20 lora_length=1024 lora_batch=4

# prebuilt NAME DEFAULT: the carried file, else the default.
prebuilt() { if [[ -x target/gpu/$1 ]]; then echo "$PWD/target/gpu/$1"; else echo "$2"; fi; }
farm=${FARM_BIN:-$(prebuilt farm target/release/farm)}
bench=${FARM_DEVICE_BENCH:-$(prebuilt device "")}
goldens=${FARM_GOLDENS:-$(prebuilt goldens "")}

say() { printf '%s\n' "$*" >&2; }

# row NAME VALUE [NOTE]: a row of the table.
row() {
    printf '%s\t%s\t%s\n' "$1" "$2" "${3:-}" >> "$rows"
    say "   $1: $2 ${3:-}"
}

# limited COMMAND...: ends it when its time is up.
limited() { timeout --kill-after=10 "$seconds" "$@"; }

# step NAME FUNCTION ARGUMENT...: a row says where it failed.
step() {
    local name=$1 started=$SECONDS
    shift
    say "== $name"
    if ! "$@"; then row "$name" "FAILED" "after $((SECONDS - started)) s; $dir/*.log"; fi
}

# calc EXPRESSION: of awk, as people read it; share: as a percentage.
calc() { awk "BEGIN {x = $1; printf (x >= 100 ? \"%.0f\" : \"%.3g\"), x}" 2> /dev/null || echo unknown; }
share() { awk "BEGIN {printf \"%.1f%%\", 100 * ($1)}" 2> /dev/null || echo unknown; }

# ---------------------------------------------------------------- building

# Without MPI, so that a bare machine can run it; ranks are threads there.
build() {
    local features=cuda,nccl out=target/gpu messages
    [[ $device != emulator ]] || features=emulator
    rm -rf "$out" && mkdir -p "$out"
    compile() { .ci/cuda.sh cargo "$@" --locked --release --no-default-features --features "$features"; }
    [[ $features != emulator ]] || compile() { cargo "$@" --locked --release --no-default-features --features "$features"; }
    compile build || return 1
    cp "${CARGO_TARGET_DIR:-target}/release/farm" "$out/farm"
    messages=$(compile bench --bench device --no-run --message-format=json) || return 1
    cp "$(executable device <<< "$messages")" "$out/device"
    messages=$(compile test --test golden --no-run --message-format=json) || return 1
    cp "$(executable golden <<< "$messages")" "$out/goldens"
    strip "$out"/*
    pwd > "$out/built_at"
    du -h "$out"/*
}

# executable NAME: its path in cargo's messages.
executable() { sed -n 's/.*"name":"'"$1"'".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1; }

# ---------------------------------------------------------------- running farm

# generate NAME FLAG...: a run of its own; its output in NAME.jsonl, its figures in NAME/stats.json.
generate() {
    local name=$1
    shift
    limited "$farm" generate --no-stage --force-new --run-dir "$dir/$name" --output "$dir/$name.jsonl" \
        --progress none --stats "$@" > "$dir/$name.log" 2>&1
}

# stat NAME FIELD: of the run's stats.json; nothing where it is null.
stat() { sed -n 's/^  "'"$2"'": \([-0-9.e+]*\),\{0,1\}$/\1/p' "$dir/$1/stats.json" 2> /dev/null | head -n 1; }

# model SHAPE: makes it once, with a tokenizer; sets layer_parameters.
model() {
    local made
    [[ -n $bench ]] || { say "no FARM_DEVICE_BENCH: see tests/gpu.sh build"; return 1; }
    made=$(limited "$bench" make "$1" "$dir/$1") || return 1
    cp "$tokenizer"/tokenizer{,_config}.json "$dir/$1/"
    layer_parameters=$(sed -n 's/^layer_parameters //p' <<< "$made")
}

# prompts COUNT TOKENS: the file's name.
prompts() {
    local file=$dir/prompts-$1-$2.jsonl
    [[ -s $file ]] || "$bench" prompts "$1" "$2" "$file" || return 1
    echo "$file"
}

# ---------------------------------------------------------------- steps

limits() {
    local flags=() name value
    [[ $device != emulator ]] || flags=(--emulator)
    limited "$bench" limits "${flags[@]}" > "$dir/limits.txt" 2> "$dir/limits.log" || return 1
    while read -r name value; do row "limit: $name" "$value"; done < "$dir/limits.txt"
}

# limit NAME: of the last limits; nothing where they were not measured.
limit() { sed -n "s/^$1 //p" "$dir/limits.txt" 2> /dev/null; }

# Of the type that the models are computed in.
product_tflops() { local rate; rate=$(limit product_tflops_bf16); echo "${rate:-$(limit product_tflops_f16)}"; }

golden_tests() {
    local passed built_at=${BUILT_AT:-$(cat target/gpu/built_at 2> /dev/null)}
    [[ -n $goldens ]] || { say "no FARM_GOLDENS: see tests/gpu.sh build"; return 1; }
    # Their models lie where the checkout was when they were built.
    if [[ -n $built_at && ! -e $built_at ]]; then
        mkdir -p "$(dirname "$built_at")" && ln -s "$PWD" "$built_at" || return 1
    fi
    FARM_TEST_DEVICE=$device limited "$goldens" device --test-threads=1 > "$dir/goldens.log" 2>&1
    passed=$(sed -n 's/^test result: [a-zA-Z]*\. \(.*\); 0 ignored.*/\1/p' "$dir/goldens.log")
    row "golden tests on $device" "${passed:-no result}"
    grep -q '^test result: ok' "$dir/goldens.log"
}

# Accesses out of bounds, races in shared memory and reads of what nobody wrote, in a short run.
sanitizer() {
    local tool errors found=0
    command -v compute-sanitizer > /dev/null || { row "compute-sanitizer" "absent"; return 0; }
    [[ -n $goldens ]] || { say "no FARM_GOLDENS: see tests/gpu.sh build"; return 1; }
    for tool in memcheck racecheck initcheck; do
        FARM_TEST_DEVICE=$device limited compute-sanitizer --tool "$tool" --error-exitcode 9 "$goldens" device::recorded \
            --test-threads=1 > "$dir/$tool.log" 2>&1 || found=1
        errors=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$dir/$tool.log" | tail -n 1)
        row "compute-sanitizer $tool" "${errors#*SUMMARY: }"
    done
    return $found
}

# ids NAME: of the records of a run.
ids() { grep -o '"token_ids":\[[^]]*\]' "$dir/$1.jsonl"; }

# same NAME ONE OTHER: whether two runs have equal token ids.
same() {
    if [[ -n $(ids "$2") ]] && cmp -s <(ids "$2") <(ids "$3"); then
        row "$1" "equal" "$(ids "$2" | wc -l) texts"
    else
        row "$1" "DIFFERENT" "$(diff <(ids "$2") <(ids "$3") | grep -c '^<') of $(ids "$2" | wc -l) texts"
    fi
}

# Texts in f32 on both; the largest difference of a token's log-probability in the model's own type (logits: golden tests).
parity() {
    local name case
    printf '%s\n' "The cat" "Once upon a time there was a farm" "one two three four five six seven" \
        "x = [1, 2, 3]" > "$dir/words.txt"
    local flags=(--prompts-file "$dir/words.txt" --max-new-tokens 32 --max-seq-len 256 --return-token-ids --dtype f32)
    for case in ${CASES:-llama_gqa qwen3 gemma3 mistral mixtral phi3 falcon_7b}; do
        name=parity-$case
        generate "$name-cpu" --model "tests/golden/$case" --device cpu "${flags[@]}" &&
            generate "$name" --model "tests/golden/$case" --device "$device" "${flags[@]}" || return 1
        same "f32 ids on CPU and $device: $case" "$name-cpu" "$name"
    done
    for name in cpu "$device"; do
        limited "$farm" score --model "$tokenizer" --prompts-file "$dir/words.txt" --device "$name" --no-stage --force-new \
            --run-dir "$dir/score-$name" --output "$dir/score-$name.jsonl" --progress none > "$dir/score-$name.log" 2>&1 ||
            return 1
    done
    row "largest difference of a log-probability, bf16" "$(difference score-cpu "score-$device")" \
        "of the largest itself; the CPU computes in f32"
}

# logprobs NAME: a number a line.
logprobs() { grep -o '"token_logprobs":\[[^]]*\]' "$dir/$1.jsonl" | grep -oE -- '-?[0-9]+(\.[0-9]+)?(e-?[0-9]+)?'; }

difference() {
    paste <(logprobs "$1") <(logprobs "$2") |
        awk 'NF == 2 {d = $1 - $2; if (d < 0) d = -d; if (d > most) most = d; if (-$1 > of) of = -$1; n++}
            END {if (n) printf "%.3g of %.3g", most, of; else print "unknown"}'
}

# Two ranks on this card, sums through the host.
tensor_parallel() {
    local flags=(--model tests/golden/llama_gqa --prompts-file "$dir/words.txt" --max-new-tokens 32 --max-seq-len 256
        --return-token-ids --dtype f32 --device "$device")
    [[ -s $dir/words.txt ]] || printf 'The cat\nOnce upon a time there was a farm\n' > "$dir/words.txt"
    generate tp-1 "${flags[@]}" && generate tp-2 "${flags[@]}" --local-ranks 2 --tensor-parallel 2 --share-device || return 1
    same "tensor parallel 2 on one card" tp-1 tp-2
}

# speed SHAPE: loading, prefill, decode by batch.
speed() {
    local shape=$1 batch name rate flags
    model "$shape" || return 1
    flags=(--model "$dir/$shape" --device "$device" --ignore-eos --max-seq-len $((prefill_tokens + decode_new)))
    name=$shape-prefill
    generate "$name" "${flags[@]}" --prompts-file "$(prompts "$prefill_prompts" "$prefill_tokens")" --max-new-tokens 1 \
        --max-batch-size "$prefill_prompts" || return 1
    row "$shape: load, GB/s" "$(calc "$(stat "$name" weight_bytes_max) / $(stat "$name" load_seconds) / 1e9")" \
        "$(calc "$(stat "$name" load_seconds)") s, tokenizer and device included"
    rate=$(stat "$name" prefill_tokens_per_second)
    row "$shape: prefill, tokens/s" "$(calc "$rate")" \
        "$(share "2 * $layer_parameters * $rate / ($(product_tflops) * 1e12)") of the product rate; goal 50%"
    for batch in "${batches[@]}"; do
        name=$shape-decode-$batch
        generate "$name" "${flags[@]}" --prompts-file "$(prompts "$batch" "$decode_tokens")" --max-batch-size "$batch" \
            --max-new-tokens "$decode_new" || return 1
        row "$shape: decode at batch $batch, tokens/s" "$(calc "$(stat "$name" decode_tokens_per_second)")" \
            "$(share "$(stat "$name" gigabytes_per_second_mean) / $(limit copy_gb_per_second)") of the copy rate; $(energy "$name")"
    done
}

energy() {
    local watts joules
    watts=$(stat "$1" device_watts_mean) joules=$(stat "$1" tokens_per_joule)
    echo "$(calc "${watts:-?}") W, $(calc "${joules:-?}") tokens/J"
}

# The same weights and prompts, one after the other: all prompts at once, generated tokens a second over the whole.
transformers() {
    local shape=${1:-7b} batch=${batches[-1]} file name=$1-beside said rate
    model "$shape" && file=$(prompts "$batch" "$decode_tokens") || return 1
    generate "$name" --model "$dir/$shape" --device "$device" --ignore-eos --prompts-file "$file" \
        --max-new-tokens "$decode_new" --max-seq-len $((decode_tokens + decode_new)) --max-batch-size "$batch" || return 1
    rate=$(stat "$name" tokens_per_second)
    row "$shape: farm, $batch prompts at once, generated tokens/s" "$(calc "$rate")"
    said=$(limited "$python" benches/transformers_gpu.py "$dir/$shape" "$file" "$decode_new" 2> "$dir/transformers.log")
    case $? in
        0) ;;
        3) row "$shape: transformers" "absent" "${said#absent }"; return 0 ;;
        *) return 1 ;;
    esac
    local theirs
    theirs=$(sed -n 's/^generated_tokens_per_second //p' <<< "$said")
    row "$shape: transformers, the same, generated tokens/s" "$theirs" "$(sed -n 's/^\(attention\|version\) //p' <<< "$said" | paste -sd' ')"
    row "$shape: farm to transformers" "$(calc "$rate / $theirs")" "goal: 3"
}

# Rank 16 on all linear layers; the median of the steps after the first.
lora() {
    local shape=${1:-7b} rate memory
    model "$shape" || return 1
    [[ -s $dir/train.jsonl ]] || words $((lora_steps * lora_batch)) "$lora_length" > "$dir/train.jsonl"
    rm -rf "$dir/adapter"
    watch_memory & local watcher=$!
    limited "$farm" finetune --model "$dir/$shape" --train "$dir/train.jsonl" --adapter-out "$dir/adapter" --no-stage \
        --device "$device" --lora-r 16 --lora-alpha 32 --max-steps "$lora_steps" --batch-size "$lora_batch" \
        --micro-batch-size "$lora_batch" --max-seq-len "$lora_length" --save-steps 0 > "$dir/lora.log" 2>&1
    local failed=$?
    kill "$watcher" 2> /dev/null
    [[ $failed == 0 ]] || return 1
    rate=$(sed -n 's/.*"tokens_per_second":\([0-9.e+-]*\).*/\1/p' "$dir/adapter/metrics.jsonl" | tail -n +2 | sort -g |
        awk '{x[NR] = $1} END {print x[int((NR + 1) / 2)]}')
    # Forward and backward without gradients of the frozen weights: 4 operations a parameter and token.
    row "$shape: LoRA, $lora_steps steps, tokens/s" "$(calc "$rate")" \
        "$(share "4 * $layer_parameters * $rate / ($(product_tflops) * 1e12)") of the product rate (4N)"
    memory=$(sort -g "$dir/memory.txt" | tail -n 1)
    row "$shape: LoRA, memory of the card, GiB" "$(calc "${memory:-?} / 1024")"
}

# What is in use of the first card, in MiB, once a second.
watch_memory() {
    : > "$dir/memory.txt"
    while nvidia-smi --id=0 --query-gpu=memory.used --format=csv,noheader,nounits >> "$dir/memory.txt" 2> /dev/null; do
        sleep 1
    done
}

# words RECORDS LENGTH: training records that fill a sequence; a letter is a token or less.
words() {
    awk -v records="$1" -v length_="$2" 'BEGIN {
        srand(1); letters = "bcfgjkmpquvwxyz"
        for (r = 0; r < records; r++) {
            text = ""
            for (w = 0; w < length_; w++) {
                if (w) text = text " "
                for (i = 0; i < 4; i++) text = text substr(letters, 1 + int(rand() * 15), 1)
            }
            printf "{\"text\": \"%s\"}\n", text
        }
    }'
}

# ---------------------------------------------------------------- the table

table() {
    echo
    echo "| | | |"
    echo "|---|---:|---|"
    awk -F '\t' '{printf "| %s | %s | %s |\n", $1, $2, $3}' "$rows"
}

# CUDA's libraries lie in the toolkit or in Python's wheels, where the loader does not look.
find_libraries() {
    local folder site
    site=$("$python" -c 'import site; print(site.getsitepackages()[0])' 2> /dev/null)
    for folder in /usr/local/cuda*/lib64 /usr/local/cuda*/targets/*/lib "$site"/nvidia/*/lib; do
        [[ ! -d $folder ]] || export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
    done
}

main() {
    local wanted=("$@")
    if [[ ${1:-} == build ]]; then
        build
        return
    fi
    [[ -x $farm ]] || { say "no farm at $farm: make cuda, or tests/gpu.sh build"; return 1; }
    mkdir -p "$dir" && : > "$rows"
    find_libraries
    if [[ ${1:-} == dry ]]; then
        prefill_prompts=2 prefill_tokens=32 decode_tokens=8 decode_new=4 batches=(1 2)
        lora_steps=2 lora_length=16 lora_batch=1
        CASES=${CASES:-llama_gqa}
        wanted=(limits parity tp tiny transformers-tiny lora-tiny)
    elif [[ $# -eq 0 ]]; then
        wanted=(limits goldens parity tp sanitizer 1.1b 7b transformers lora 13b)
    fi
    row "farm" "$("$farm" --version)" "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null | head -n 1)"
    # Shares of the limits need them, also of an earlier call.
    [[ " ${wanted[*]} " == *" limits "* || -s $dir/limits.txt ]] || wanted=(limits "${wanted[@]}")
    local name
    for name in "${wanted[@]}"; do
        case $name in
            limits) step "limits" limits ;;
            goldens) step "golden tests" golden_tests ;;
            sanitizer) step "sanitizer" sanitizer ;;
            parity) step "parity" parity ;;
            tp) step "tensor parallel" tensor_parallel ;;
            transformers) step "transformers" transformers 7b ;;
            lora) step "LoRA" lora 7b ;;
            transformers-*) step "$name" transformers "${name#*-}" ;;
            lora-*) step "$name" lora "${name#*-}" ;;
            *) step "speed of $name" speed "$name" ;;
        esac
    done
    table
    ! grep -qE $'\t(FAILED|DIFFERENT)' "$rows"
}

main "$@"
