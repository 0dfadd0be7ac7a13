#!/usr/bin/env bash
# farm as its users run it, end to end, on a Slurm cluster of four nodes that this script brings up and takes down.
#
#   FARM_BIN=target/release/farm tests/cluster/e2e.sh
#   ONLY=staged_on_every_node,… tests/cluster/e2e.sh       some of the tests
#
# FARM_BIN, FARM_MODEL: see farm.sh. SEED (default: drawn) sets the kills of a_run_that_is_killed_again_and_again.
# Exit: 0 passed, 1 failed, 77 this machine cannot run a cluster, or there is no binary.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$HERE/farm.sh"
. "$HERE/ledger.sh"
SEED=${SEED:-$((RANDOM * RANDOM % 100000))}

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
    # These nodes have two CPUs.
    with_module modulefiles sbatch --test-only --cpus-per-task=2 "$APPS/share/farm/slurm/farm-gpu.sbatch" --help
    with_module modulefiles sbatch --test-only -N2 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=1 \
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

# Starts a template job that takes a while, and waits until its first records are out. Its id lands in $job.
long_job() {
    local name=$1
    mkdir -p "$SCRATCH/$name"
    write_prompts 250 > "$SCRATCH/$name/prompts.jsonl"
    job=$(with_module modulefiles sbatch --parsable -N2 --output="$SCRATCH/$name.log" \
        "$APPS/share/farm/slurm/farm-cpu.sbatch" --prompts-file "$SCRATCH/$name/prompts.jsonl" --model "$MODEL" \
        --output "$(output "$name")" --run-dir "$SCRATCH/$name/run" --max-new-tokens 200 --ignore-eos --max-batch-size 2)
    eventually 30 some_records "$name" || fail "no records in 30 s: $(tail -n 3 "$SCRATCH/$name.log" | xargs)"
}

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

# ---------------------------------------------------------------- fine-tuning

# finetuning NAME STEPS ARG…: flags of a training with dropout, into $SCRATCH/NAME
finetuning() {
    local name=$1 steps=$2; shift 2
    echo "--model $MODEL --train $APPS/share/farm/prompts/finetune/train.jsonl --adapter-out $SCRATCH/$name" \
        "--max-steps $steps --batch-size 8 --micro-batch-size 2 --lora-dropout 0.1 --save-steps 5 --seed 3 $*"
}

# same_losses NAME NAME: step by step, to 1e-5
same_losses() {
    local name
    for name in "$1" "$2"; do
        grep '"kind":"train"' "$SCRATCH/$name/metrics.jsonl" |
            sed -E 's/.*"step":([0-9]+),.*"loss":([^,]+),.*/\1 \2/' > "$SCRATCH/$name.losses"
        [ -s "$SCRATCH/$name.losses" ] || fail "$name has no losses"
    done
    paste -d ' ' "$SCRATCH/$1.losses" "$SCRATCH/$2.losses" > "$SCRATCH/losses"
    awk 'NF != 4 || $1 != $3 || $2 - $4 > 1e-5 * $2 || $4 - $2 > 1e-5 * $2 { exit 1 }' "$SCRATCH/losses" ||
        fail "losses differ: $(xargs < "$SCRATCH/losses")"
}

same_adapter() { same "$SCRATCH/$1/adapter_model.safetensors" "$SCRATCH/$2/adapter_model.safetensors"; }

test_finetune_is_the_same_for_every_launch() {
    # shellcheck disable=SC2046 # lists of arguments
    {
        login "$FARM" finetune $(finetuning tuned-alone 6)
        login srun --mpi=pmix -N4 "$FARM" finetune $(finetuning tuned-srun4 6)
        login srun --mpi=pmix -N4 "$FARM" finetune $(finetuning tuned-2x2 6 --tensor-parallel 2)
    }
    same_losses tuned-alone tuned-srun4
    same_losses tuned-alone tuned-2x2
}

test_template_finetune() {
    # shellcheck disable=SC2046
    {
        template farm-finetune "" $(finetuning tuned-template 6)
        template farm-finetune-13b "" $(finetuning tuned-13b 6)
    }
    same_losses tuned-template tuned-13b
    with_module modulefiles sbatch --test-only -N4 "$APPS/share/farm/slurm/farm-finetune-70b.sbatch" --help
}

is_at_checkpoint() { compgen -G "$SCRATCH/$1/checkpoints/checkpoint-*" > /dev/null; }

# Warned as Slurm does two minutes before the time limit, the job comes back and ends with the adapter of one that
# nothing disturbed.
test_warned_finetune_requeues_itself_and_finishes() {
    local job
    # shellcheck disable=SC2046
    {
        template farm-finetune-nodes -N2 $(finetuning tuned-undisturbed 60)
        job=$(with_module modulefiles sbatch --parsable -N2 --output="$SCRATCH/tuned-warned.log" \
            "$APPS/share/farm/slurm/farm-finetune-nodes.sbatch" $(finetuning tuned-warned 60))
    }
    eventually 60 is_at_checkpoint tuned-warned || { cat "$SCRATCH/tuned-warned.log"; fail "no checkpoint"; }
    login scancel --batch --signal=USR1 "$job"
    cluster hurry "$job" || fail "not requeued: $(tail -n 3 "$SCRATCH/tuned-warned.log" | xargs)"
    eventually 120 job_is "$job" COMPLETED || { cat "$SCRATCH/tuned-warned.log"; fail "it is $(job_state "$job")"; }
    expect starts 2 "$(grep -c 'farm-job: job' "$SCRATCH/tuned-warned.log")"
    expect_match "the restart" "going on after step" "$SCRATCH/tuned-warned.log"
    same_adapter tuned-undisturbed tuned-warned
    same_losses tuned-undisturbed tuned-warned
}

# ---------------------------------------------------------------- the ledger: runs that are killed, runs of several jobs

LONG_RECORDS=400

# What the runs below must come to, and how long its work takes: $LONG_PROMPTS, $LONG_OUTPUT, $LONG_SECONDS.
long_reference() {
    LONG_PROMPTS=$SCRATCH/long.jsonl LONG_OUTPUT=$(output long)
    if [ ! -e "$LONG_OUTPUT" ]; then
        write_long_prompts $LONG_RECORDS > "$LONG_PROMPTS"
        # shellcheck disable=SC2046 # a list of arguments
        login srun --mpi=pmix -N4 "$FARM" $(long_arguments long "$LONG_PROMPTS")
        complete "$LONG_OUTPUT" "$LONG_PROMPTS"
    fi
    LONG_SECONDS=$(stat_of long generate_seconds)
}

# kills.sh has the long one.
test_a_run_that_is_killed_again_and_again() {
    long_reference
    killed_run killed-again "$LONG_PROMPTS" 4 "$(awk "BEGIN { print int($LONG_SECONDS * 300 + 1500) }")"
    [ "$kills_done" -ge 2 ] || fail "the run was over after $kills_done kills"
    same "$LONG_OUTPUT" "$(output killed-again)"
    each_record_once killed-again $LONG_RECORDS
}

# The limit leaves each start half of it, and half the records, one at a time on each rank, take longer than that.
test_time_limit_and_requeues() {
    local job limit
    long_reference
    limit=$(awk "BEGIN { print int($LONG_SECONDS + 1) }")
    mkdir -p "$SCRATCH/limited"
    head -n $((LONG_RECORDS / 2)) "$LONG_PROMPTS" > "$SCRATCH/limited/prompts.jsonl"
    # shellcheck disable=SC2046 # a list of arguments
    job=$(login sbatch --parsable -N4 --output="$SCRATCH/limited.log" "$APPS/share/farm/slurm/farm-cpu.sbatch" \
        $(long_arguments limited "$SCRATCH/limited/prompts.jsonl" --max-batch-size 1 --time-limit "${limit}s"))
    eventually 120 finished_with_requeues "$job" || { cat "$SCRATCH/limited.log"; fail "the job is $(job_state "$job")"; }
    [ "$(grep -c 'farm-job: job' "$SCRATCH/limited.log")" -ge 2 ] || fail "it needed no requeue"
    # A record's text depends on its place in the file and not on how many follow.
    head -n $((LONG_RECORDS / 2)) "$LONG_OUTPUT" | cmp - "$(output limited)" || fail "the output differs"
    each_record_once limited $((LONG_RECORDS / 2))
}

test_array_on_one_run() {
    local job task
    long_reference
    # shellcheck disable=SC2046 # a list of arguments
    job=$(login sbatch --parsable --array=0-3 --output="$SCRATCH/array-run-%a.log" \
        "$APPS/share/farm/slurm/farm-array.sbatch" $(long_arguments array-run "$LONG_PROMPTS"))
    for task in 0 1 2 3; do
        eventually 120 job_is "${job}_$task" COMPLETED || fail "task $task is $(job_state "${job}_$task")"
        login scontrol -o show job "${job}_$task" > "$SCRATCH/task"
        expect_match "task $task" "JobState=COMPLETED .*ExitCode=0:0" "$SCRATCH/task"
    done
    same "$LONG_OUTPUT" "$(output array-run)"
    each_record_once array-run $LONG_RECORDS
    expect "launches" 4 "$(status_of array-run launches)"
}

live_owners() { login "$FARM" status "$(run_dir "$1")" 2> /dev/null | grep -cE '^ +[0-9]+ +job [0-9]+ on host' || true; }
live_owners_are() { [ "$(live_owners "$1")" = "$2" ]; }

# One of the two jobs is killed for good, the other finishes what it leaves: three times the work, so that there is
# something left.
test_submit_to_all_partitions() {
    local jobs prompts=$SCRATCH/submitted/prompts.jsonl
    long_reference
    mkdir -p "$SCRATCH/submitted"
    write_long_prompts $((3 * LONG_RECORDS)) > "$prompts"
    # shellcheck disable=SC2046 # a list of arguments
    login "$FARM" submit --partitions=all --sbatch-arg=--cpus-per-task=1 --stats $(long_arguments submitted "$prompts" --max-batch-size 4) \
        > "$SCRATCH/submitted/said"
    expect_match "what it said" "^farm status $(run_dir submitted)$" "$SCRATCH/submitted/said"
    mapfile -t jobs < <(grep -oE '^job [0-9]+' "$SCRATCH/submitted/said" | cut -d' ' -f2)
    expect "jobs" 2 ${#jobs[@]}
    eventually 30 live_owners_are submitted 2 || { cat "$(run_dir submitted)"/logs/*; fail "live owners: $(live_owners submitted)"; }
    eventually 30 some_records submitted || fail "no records"
    login scancel "${jobs[0]}"
    eventually 20 job_is "${jobs[0]}" CANCELLED || fail "the cancelled job is $(job_state "${jobs[0]}")"
    eventually 20 live_owners_are submitted 1 || fail "live owners after a job's end: $(live_owners submitted)"
    eventually 90 job_is "${jobs[1]}" COMPLETED || fail "the other job is $(job_state "${jobs[1]}")"
    complete "$(output submitted)" "$prompts"
    head -n $LONG_RECORDS "$(output submitted)" | cmp - "$LONG_OUTPUT" || fail "the output differs"
    each_record_once submitted $((3 * LONG_RECORDS))
    login "$FARM" status "$(run_dir submitted)" > "$SCRATCH/submitted/status"
    expect_match "status at the end" "complete, the output is written" "$SCRATCH/submitted/status"
}

# ---------------------------------------------------------------- all of it

require_farm
own_cluster "/var/tmp/farm-e2e-$UID" 4
prepare
run_tests greedy_is_the_same_for_every_launch sampling_is_the_same_for_every_launch \
    tensor_parallel_gives_the_same_text \
    staged_on_every_node_and_reused flipped_byte_is_mended staged_copy_goes_at_the_end killed_while_staging \
    silent_singletons_are_refused bad_lines_become_error_records missing_model_ends_every_rank_at_once \
    module_files template_cpu template_notices_a_step_that_did_not_start template_by_mpirun template_gpu_is_accepted template_tensor_parallel template_array \
    warned_job_requeues_itself_and_finishes cancelled_job_does_not_come_back \
    finetune_is_the_same_for_every_launch template_finetune warned_finetune_requeues_itself_and_finishes \
    a_run_that_is_killed_again_and_again time_limit_and_requeues array_on_one_run submit_to_all_partitions
finish
