#!/usr/bin/env bash
# The long tests of runs that are killed, on a Slurm cluster of four nodes that this script brings up and takes down:
# some ten minutes. e2e.sh has the short ones.
#
#   FARM_BIN=target/release/farm tests/cluster/kills.sh
#   SEED=7 KILLS=50 tests/cluster/kills.sh            other kills, more of them
#
# FARM_BIN, FARM_MODEL: see farm.sh. SEED (default: drawn) sets sizes, kinds and delays of the kills.
# UNINTERRUPTED_SECONDS (140): how long the run is to take without kills.
# Exit: 0 passed, 1 failed, 77 this machine cannot run a cluster, or there is no binary.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$HERE/farm.sh"
. "$HERE/ledger.sh"

SEED=${SEED:-$((RANDOM * RANDOM % 100000))}
KILLS=${KILLS:-30}
UNINTERRUPTED_SECONDS=${UNINTERRUPTED_SECONDS:-140}
COMMAND_SECONDS_MAX=900

# The prompts, so many that four nodes are busy with them for UNINTERRUPTED_SECONDS, and the output of one launch.
# The machine's speed is found by a trial.
reference() {
    LONG_PROMPTS=$SCRATCH/long.jsonl
    [ ! -e "$(output reference)" ] || return 0
    local trial_records=400 seconds
    write_long_prompts $trial_records > "$LONG_PROMPTS"
    srun_long trial
    seconds=$(stat_of trial generate_seconds)
    write_long_prompts "$(awk "BEGIN { print int($trial_records * $UNINTERRUPTED_SECONDS / $seconds) }")" > "$LONG_PROMPTS"
    local started=$SECONDS
    srun_long reference
    say "uninterrupted: $(grep -c . "$LONG_PROMPTS") records on 4 nodes in $((SECONDS - started)) s"
    echo $((SECONDS - started)) > "$SCRATCH/reference/seconds"
}

# shellcheck disable=SC2046 # a list of arguments
srun_long() { login srun --mpi=pmix -N4 "$FARM" $(long_arguments "$1" "$LONG_PROMPTS" --max-batch-size 4); }

test_a_run_that_is_killed_again_and_again() {
    local seconds
    reference
    seconds=$(cat "$SCRATCH/reference/seconds")
    [ "$seconds" -gt 120 ] || [ "$UNINTERRUPTED_SECONDS" -le 120 ] ||
        fail "uninterrupted it took $seconds s only: UNINTERRUPTED_SECONDS=$((UNINTERRUPTED_SECONDS * 2)) makes it longer"
    # On average as much time between the kills, starts included, as the whole run takes.
    killed_run killed "$LONG_PROMPTS" "$KILLS" $((seconds * 2000 / KILLS))
    same "$(output reference)" "$(output killed)"
    each_record_once killed "$(grep -c . "$LONG_PROMPTS")"
    say "the output is the same, byte for byte"
}

# Two thirds of the work, for a job whose time ends after 60 s. A record's text depends on its place in the file and
# not on how many follow.
test_a_short_time_limit_and_requeues() {
    local job records started=$SECONDS
    reference
    records=$(($(grep -c . "$LONG_PROMPTS") * 2 / 3))
    mkdir -p "$SCRATCH/limited"
    head -n "$records" "$LONG_PROMPTS" > "$SCRATCH/limited/prompts.jsonl"
    # shellcheck disable=SC2046 # a list of arguments
    job=$(login sbatch --parsable -N4 --time=1 --output="$SCRATCH/limited.log" "$APPS/share/farm/slurm/farm-cpu.sbatch" \
        $(long_arguments limited "$SCRATCH/limited/prompts.jsonl" --max-batch-size 4))
    eventually 600 finished_with_requeues "$job" || fail "the job is $(job_state "$job")"
    say "$records records in $(grep -c 'farm-job: job' "$SCRATCH/limited.log") starts of at most 60 s each," \
        "$((SECONDS - started)) s, $(frames "$STARTED" limited) began, $(frames "$SAVED" limited) saved"
    [ "$(grep -c 'farm-job: job' "$SCRATCH/limited.log")" -ge 2 ] || fail "it needed no requeue"
    head -n "$records" "$(output reference)" | cmp - "$(output limited)" || fail "the output differs"
    each_record_once limited "$records"
}

require_farm
own_cluster "/var/tmp/farm-kills-$UID" 4
prepare
run_tests a_run_that_is_killed_again_and_again a_short_time_limit_and_requeues
finish
