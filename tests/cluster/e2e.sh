#!/usr/bin/env bash
# farm as its users run it, end to end, on a Slurm cluster of four nodes that this script brings up and takes down.
#
#   FARM_BIN=target/release/farm tests/cluster/e2e.sh
#   ONLY=staged_on_every_node,… tests/cluster/e2e.sh       some of the tests
#
# FARM_BIN: the binary (default: the newer of target/{release,debug}/farm); FARM_MODEL: a model folder (models/tiny).
# Exit: 0 passed, 1 failed, 77 this machine cannot run a cluster, or there is no binary.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

newest_binary() { ls -t "$REPOSITORY"/target/{release,debug}/farm 2> /dev/null | head -n 1; }
BIN=$(readlink -f "${FARM_BIN:-$(newest_binary)}") || BIN=
SOURCE_MODEL=$(readlink -f "${FARM_MODEL:-$REPOSITORY/models/tiny}")
# farm reads FARM_… as its flags; those of the caller are not for the runs below.
for variable in "${!FARM_@}"; do
    case $variable in FARM_CLUSTER_*) ;; *) unset "$variable" ;; esac
done

# ---------------------------------------------------------------- farm, its inputs, its results

# What the tests share on the "parallel file system": the installed farm, the model, the prompts.
prepare() {
    APPS=$SCRATCH/apps/farm
    FARM=$APPS/bin/farm
    MODEL=$SCRATCH/models/tiny
    PROMPTS=$SCRATCH/prompts.jsonl
    make --no-print-directory -s -C "$REPOSITORY" install PREFIX="$APPS" FARM_BIN="$BIN" > /dev/null ||
        { echo "make install failed"; exit 1; }
    mkdir -p "$SCRATCH/models"
    cp -r "$SOURCE_MODEL" "$MODEL"
    write_prompts 24 > "$PROMPTS"
}

# Prompts of several lengths, some with an id and sampling of their own.
write_prompts() {
    local i words=(the quick brown fox counts seven small stones beside a river)
    for i in $(seq 0 $(($1 - 1))); do
        case $((i % 4)) in
            0) echo "{\"prompt\":\"${words[*]:0:$((i % 11 + 1))}\"}" ;;
            1) echo "{\"id\":\"record-$i\",\"prompt\":\"Once upon a time\"}" ;;
            2) echo "{\"prompt\":\"${words[*]:$((i % 7))}\",\"max_new_tokens\":$((i % 5 + 3))}" ;;
            3) echo "{\"prompt\":\"two plus two is\",\"metadata_$i\":true}" ;;
        esac
    done
}

# arguments NAME ARG…: the usual command line, with a run folder and an output of its own below $SCRATCH/NAME
arguments() {
    local name=$1; shift
    echo "--prompts-file $PROMPTS --model $MODEL --output $SCRATCH/$name/out.jsonl --run-dir $SCRATCH/$name/run" \
        "--max-new-tokens 16 $*"
}

# srun_farm NAME RANKS_AND_NODES ARG…
srun_farm() {
    local name=$1 size=$2; shift 2
    # shellcheck disable=SC2046,SC2086 # lists of arguments
    login srun --mpi=pmix $size "$FARM" $(arguments "$name" "$@")
}

output() { echo "$SCRATCH/$1/out.jsonl"; }

# complete FILE INPUT: one record an input line, in input order, none failed
complete() {
    local wanted
    wanted=$(grep -c . "$2")
    expect "records in $1" "$wanted" "$(wc -l < "$1")"
    expect "order of $1" "$(seq 0 $((wanted - 1)) | xargs)" "$(indices "$1")"
    if grep -q '"error":{' "$1"; then fail "$1 has error records: $(grep -m 1 '"error":{' "$1")"; fi
}

indices() { grep -oE '"index":[0-9]+' "$1" | cut -d: -f2 | xargs; }

same() { cmp "$1" "$2" || fail "$2 differs from $1"; }

# stat NAME FIELD: a field of the job's stats.json
stat_of() { grep -oE "\"$2\": *[^,}]+" "$SCRATCH/$1/run/stats.json" | head -n 1 | sed 's/.*: *//'; }

# ---------------------------------------------------------------- one answer, however farm is started

same_for_every_launch() {
    local name=$1; shift
    # shellcheck disable=SC2046 # lists of arguments
    {
        login "$FARM" $(arguments "$name-alone" "$@")
        login mpirun -n 1 "$FARM" $(arguments "$name-mpirun1" "$@")
        login mpirun -n 2 "$FARM" $(arguments "$name-mpirun2" "$@")
    }
    srun_farm "$name-srun4" -N4 "$@"
    srun_farm "$name-srun2x2" "-N2 -n4" "$@"
    complete "$(output "$name-alone")" "$PROMPTS"
    local launch
    for launch in mpirun1 mpirun2 srun4 srun2x2; do
        same "$(output "$name-alone")" "$(output "$name-$launch")"
    done
}

test_greedy_is_the_same_for_every_launch() { same_for_every_launch greedy --temperature 0; }
test_sampling_is_the_same_for_every_launch() { same_for_every_launch sampled --temperature 0.8 --seed 7; }

# ---------------------------------------------------------------- staging

NODES="n1 n2 n3 n4"

empty_stage() { local n; for n in $NODES; do node "$n" sh -c 'rm -rf /dev/shm/*'; done; }

# The staged copy of the model's weights on a node.
staged_weights() { node "$1" sh -c 'ls /dev/shm/farm-*/*/model.safetensors'; }

copies_are_right() {
    local n
    for n in $NODES; do
        node "$n" sh -c "cmp $MODEL/model.safetensors /dev/shm/farm-*/*/model.safetensors" || fail "no right copy on $n"
    done
}

nothing_partial() {
    local n left
    for n in $NODES; do
        left=$(node "$n" find /dev/shm -name '*.partial*' -type f)
        [ -z "$left" ] || fail "left on $n: $left"
    done
}

test_staged_on_every_node_and_reused() {
    empty_stage
    srun_farm staged-first -N4 --keep-staged
    copies_are_right
    nothing_partial
    local read model
    read=$(stat_of staged-first bytes_read_source)
    model=$(cat "$MODEL"/*.json "$MODEL"/*.safetensors | wc -c)
    [ "$read" -gt 0 ] && [ $((read * 100)) -le $((model * 105)) ] ||
        fail "the first run read $read bytes for four nodes; the model has $model"
    srun_farm staged-second -N4 --keep-staged
    expect "bytes the second run read" 0 "$(stat_of staged-second bytes_read_source)"
    expect "reused" true "$(stat_of staged-second reused)"
    same "$(output staged-first)" "$(output staged-second)"
}

# The time stamp is put back, as bad memory would leave it: only the content tells.
test_flipped_byte_is_mended() {
    srun_farm flip-before -N4 --keep-staged
    local file
    file=$(staged_weights n3)
    node n3 bash -c '
        touch -r "$0" /tmp/stamp
        middle=$(($(stat -c %s "$0") / 2))
        byte=$(od -An -tu1 -j $middle -N 1 "$0")
        printf "\\x$(printf %x $((byte ^ 64)))" | dd of="$0" bs=1 seek=$middle conv=notrunc status=none
        touch -r /tmp/stamp "$0"' "$file"
    if node n3 cmp -s "$MODEL/model.safetensors" "$file"; then fail "the test flipped nothing"; fi
    srun_farm flip-after -N4 --keep-staged
    copies_are_right
    same "$(output flip-before)" "$(output flip-after)"
}

test_staged_copy_goes_at_the_end() {
    empty_stage
    srun_farm unstaged -N4
    local n left
    for n in $NODES; do
        left=$(node "$n" find /dev/shm -type f -size +8k)
        [ -z "$left" ] || fail "left on $n: $left"
    done
}

# Links slow enough that the copy is still on its way when the job is killed.
test_killed_while_staging() {
    empty_stage
    trap 'cluster limit all none' EXIT
    cluster limit all 400kbit
    srun_farm killed "-N4 --job-name=killed" --keep-staged & local srun=$!
    eventually 20 something_staged_on n2 || fail "nothing reached n2 in 20 s"
    if [ -s "$SCRATCH/killed/run/stats.json" ]; then fail "the job was over before it could be killed"; fi
    login scancel --signal=KILL --name=killed
    wait "$srun" && fail "the job outlived its kill"
    cluster limit all none
    srun_farm after-kill -N4 --keep-staged
    copies_are_right
    nothing_partial
    complete "$(output after-kill)" "$PROMPTS"
}

something_staged_on() { [ -n "$(node "$1" find /dev/shm -path '*farm-*' -type f -size +0)" ]; }

# ---------------------------------------------------------------- what goes wrong

test_silent_singletons_are_refused() {
    local status=0
    # shellcheck disable=SC2046 # lists of arguments
    login srun --mpi=none -n 2 "$FARM" $(arguments singletons) 2> "$SCRATCH/singletons.err" || status=$?
    [ "$status" != 0 ] || fail "two singletons went on as if they were a job"
    expect_match "the message" "--mpi=pmix" "$SCRATCH/singletons.err"
}

test_bad_lines_become_error_records() {
    local bad=$SCRATCH/bad.jsonl status=0
    printf '%s\n' '{"prompt":"good"}' '{"prompt":' '[1,2]' '{"id":"x"}' '{"prompt":7}' \
        '{"prompt":"t","temperature":-3}' '{"prompt":"good too"}' > "$bad"
    printf '{"prompt":"\xff"}\n' >> "$bad"
    login srun --mpi=pmix -N2 "$FARM" --prompts-file "$bad" --model "$MODEL" --output "$SCRATCH/bad-out.jsonl" \
        --max-new-tokens 4 || status=$?
    expect "exit code" 4 "$status"
    expect order "0 1 2 3 4 5 6 7" "$(indices "$SCRATCH/bad-out.jsonl")"
    expect "error records" 6 "$(grep -c '"error":{' "$SCRATCH/bad-out.jsonl")"
}

test_missing_model_ends_every_rank_at_once() {
    local started=$SECONDS
    # shellcheck disable=SC2016 # for the shell on the node
    login srun --mpi=pmix -N4 sh -c '"$@"; echo "$SLURM_PROCID left with $?"' sh \
        "$FARM" --prompts-file "$PROMPTS" --model "$SCRATCH/no-such-model" --output "$SCRATCH/no.jsonl" \
        > "$SCRATCH/missing.out" 2> "$SCRATCH/missing.err"
    expect "exit codes" "0 left with 3 1 left with 3 2 left with 3 3 left with 3" "$(sort "$SCRATCH/missing.out" | xargs)"
    [ $((SECONDS - started)) -le 5 ] || fail "took $((SECONDS - started)) s"
    expect_match "the message" "no-such-model" "$SCRATCH/missing.err"
}

# ---------------------------------------------------------------- templates, through the module

# with_module ROOT CMD…: as in a user's login shell after `module load farm`
with_module() {
    local root=$1; shift
    [ -e /usr/share/lmod ] || skip "no Lmod"
    # shellcheck disable=SC2016 # for the login shell
    login bash -lc 'set -e; module use "$0"; module load farm; cd "$1"; shift; "$@"' \
        "$APPS/share/$root" "$SCRATCH" "$@"
}

# template NAME OPTIONS_FOR_SBATCH ARG…: submits it, waits for its end, returns its exit code
template() {
    local name=$1 options=$2 status=0; shift 2
    # shellcheck disable=SC2086 # lists of arguments
    with_module modulefiles sbatch --wait --output="$SCRATCH/$name.log" $options \
        "$APPS/share/farm/slurm/$name.sbatch" "$@" || status=$?
    cat "$SCRATCH/$name".log* 2> /dev/null || true
    return $status
}

test_module_files() {
    local root
    for root in modulefiles modulefiles-tcl; do
        expect "$root: farm found" "$FARM" "$(with_module "$root" sh -c 'command -v farm')"
        expect "$root: FARM_ROOT" "$APPS" "$(with_module "$root" printenv FARM_ROOT)"
        with_module "$root" bash -c 'module help farm; module whatis farm' > "$SCRATCH/$root.txt" 2>&1
        expect_match "$root: help" "srun farm" "$SCRATCH/$root.txt"
        expect_match "$root: whatis" "Version: *[0-9]" "$SCRATCH/$root.txt"
    done
}

test_template_cpu() {
    # shellcheck disable=SC2046
    template farm-cpu "-N4" $(arguments template-cpu)
    complete "$(output template-cpu)" "$PROMPTS"
}

# srun itself exits with 0 then, and the job would look finished. A left-over PMIx socket stands for a sick node.
test_template_notices_a_step_that_did_not_start() {
    local job status=0 socket
    job=$(login sbatch --parsable --hold "$APPS/share/farm/slurm/farm-cpu.sbatch" --help)
    for socket in "$FARM_CLUSTER_DIR"/spool/n*; do mkdir -p "$socket/stepd.slurm.pmix.$((job + 1)).0/in-the-way"; done
    login scancel "$job"
    # shellcheck disable=SC2046
    template farm-cpu "" $(arguments never-started) || status=$?
    expect "exit code" 1 "$status"
    expect_match "the message" "did not start farm" "$SCRATCH/farm-cpu.log"
}

test_template_by_mpirun() {
    # shellcheck disable=SC2046
    FARM_LAUNCHER=mpirun template farm-cpu "-N2 --ntasks-per-node=2" $(arguments template-mpirun)
    complete "$(output template-mpirun)" "$PROMPTS"
}

test_template_gpu_is_accepted() {
    with_module modulefiles sbatch --test-only "$APPS/share/farm/slurm/farm-gpu.sbatch" --help
    with_module modulefiles sbatch --test-only -N2 --ntasks-per-node=2 --gpus-per-node=2 \
        "$APPS/share/farm/slurm/farm-gpu.sbatch" --help
}

test_template_tensor_parallel() {
    # shellcheck disable=SC2046
    template farm-tensor-parallel "" $(arguments template-tp)
    complete "$(output template-tp)" "$PROMPTS"
}

# Two groups of two ranks: each group's ranks are neighbours, so on one node; with one task a node a group spans two.
test_tensor_parallel_gives_the_same_text() {
    # shellcheck disable=SC2046
    login "$FARM" $(arguments tp-alone)
    srun_farm tp-2x2 "-N2 -n4" --tensor-parallel 2
    srun_farm tp-across "-N4 -n4" --tensor-parallel 2
    complete "$(output tp-alone)" "$PROMPTS"
    same "$(output tp-alone)" "$(output tp-2x2)"
    same "$(output tp-alone)" "$(output tp-across)"
}

test_template_array() {
    split -n r/2 -d -a 2 --additional-suffix=.jsonl "$PROMPTS" "$SCRATCH/part-"
    FARM_PROMPTS_PATTERN='part-%2a.jsonl' template farm-array "--array=0-1" \
        --model "$MODEL" --output "array-%a.jsonl" --max-new-tokens 8
    complete "$SCRATCH/array-0.jsonl" "$SCRATCH/part-00.jsonl"
    complete "$SCRATCH/array-1.jsonl" "$SCRATCH/part-01.jsonl"
}

job_state() { login squeue -h -j "$1" -t all -o %T | head -n 1; }
job_is() { [ "$(job_state "$1")" = "$2" ]; }

# Starts a template job that takes a while, and waits until its first records are out. Its id lands in $job.
long_job() {
    local name=$1
    mkdir -p "$SCRATCH/$name"
    write_prompts 250 > "$SCRATCH/$name/prompts.jsonl"
    job=$(with_module modulefiles sbatch --parsable -N2 --output="$SCRATCH/$name.log" \
        "$APPS/share/farm/slurm/farm-cpu.sbatch" --prompts-file "$SCRATCH/$name/prompts.jsonl" --model "$MODEL" \
        --output "$(output "$name")" --run-dir "$SCRATCH/$name/run" --max-new-tokens 200 --ignore-eos --max-batch-size 2)
    eventually 30 some_records "$SCRATCH/$name" || fail "no records in 30 s: $(tail -n 3 "$SCRATCH/$name.log" | xargs)"
}

# Records are in the ranks' part files before their turn in the output comes.
some_records() { [ -n "$(find "$1" \( -name '*.partial' -o -path '*/parts/*' \) -size +0)" ]; }

# What Slurm does two minutes before the time limit; the job comes back and goes on.
test_warned_job_requeues_itself_and_finishes() {
    local job
    long_job requeue
    login scancel --batch --signal=USR1 "$job"
    cluster hurry "$job" || fail "not requeued: $(tail -n 3 "$SCRATCH/requeue.log" | xargs)"
    eventually 120 job_is "$job" COMPLETED || { cat "$SCRATCH/requeue.log"; fail "the requeued job is $(job_state "$job")"; }
    complete "$(output requeue)" "$SCRATCH/requeue/prompts.jsonl"
    expect starts 2 "$(grep -c 'farm-job: job' "$SCRATCH/requeue.log")"
}

test_cancelled_job_does_not_come_back() {
    local job
    long_job cancel
    login scancel "$job"
    eventually 20 job_is "$job" CANCELLED || fail "the cancelled job is $(job_state "$job")"
    if grep -q "restart 1 of" "$SCRATCH/cancel.log"; then fail "a cancelled job queued itself again"; fi
}

# ---------------------------------------------------------------- all of it

if [ -z "$BIN" ] || [ ! -x "$BIN" ]; then
    echo "skip all: no farm binary (make build, or set FARM_BIN)"
    finish
fi
own_cluster "/var/tmp/farm-e2e-$UID" 4
prepare
run_tests greedy_is_the_same_for_every_launch sampling_is_the_same_for_every_launch \
    tensor_parallel_gives_the_same_text \
    staged_on_every_node_and_reused flipped_byte_is_mended staged_copy_goes_at_the_end killed_while_staging \
    silent_singletons_are_refused bad_lines_become_error_records missing_model_ends_every_rank_at_once \
    module_files template_cpu template_notices_a_step_that_did_not_start template_by_mpirun template_gpu_is_accepted template_tensor_parallel template_array \
    warned_job_requeues_itself_and_finishes cancelled_job_does_not_come_back
finish
