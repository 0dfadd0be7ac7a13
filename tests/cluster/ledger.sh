# shellcheck shell=bash disable=SC2034,SC2154 # some variables are for the caller, some are the caller's
# What e2e.sh and kills.sh share on runs that are killed, and on runs of several jobs. Sourced, after farm.sh.

# ---------------------------------------------------------------- what a run directory says

run_dir() { echo "$SCRATCH/$1/run"; }

# status_of NAME FIELD: a figure of `farm status`
status_of() {
    login "$FARM" status --json "$(run_dir "$1")" > "$SCRATCH/status.json"
    grep -oE "\"$2\":[^,}]+" "$SCRATCH/status.json" | head -n 1 | cut -d: -f2
}

# frames KIND NAME [LAUNCH]: frames in the journals, counted without farm. A frame begins with four bytes that never
# stand in text, and its kind (src/ledger/journal).
STARTED='\x02' FINISHED='\x03' FAILED='\x04' SAVED='\x05'
frames() {
    { find "$(run_dir "$2")/journal" -name "${3:-*}-*.farm" -exec cat {} + 2> /dev/null || true; } |
        { LC_ALL=C grep -aoP "\xF5\xC0\xFF\xF8$1" || true; } | wc -l
}

some_records() { [ "$(frames "$FINISHED" "$1")" -gt 0 ]; }

# each_record_once NAME RECORDS: the run is complete, and no record was journalled twice
each_record_once() {
    local finished
    finished=$(($(frames "$FINISHED" "$1") + $(frames "$FAILED" "$1")))
    expect "journalled records of $1" "$2" "$finished"
    expect "duplicates in $1" 0 "$(status_of "$1" duplicates)"
    expect "records done in $1" "$2" "$(status_of "$1" records_done)"
    # Whose processes were killed counts as at work until that is noticed.
    eventually 40 is_complete "$1" || fail "$1 is not complete: $(cat "$SCRATCH/status.json")"
}

is_complete() { [ "$(status_of "$1" complete)" = true ]; }

# ---------------------------------------------------------------- work that takes a while

# Records of very different lengths, greedy and sampled.
write_long_prompts() {
    awk -v count="$1" 'BEGIN {
        for (i = 0; i < count; i++)
            printf "{\"prompt\":\"Story %d of the river and\",\"max_new_tokens\":%d%s}\n", i,
                i % 20 == 19 ? 400 : 30 + i * 37 % 101, i % 3 ? ",\"temperature\":0.8" : ""
    }'
}

# long_arguments NAME PROMPTS ARG…
long_arguments() {
    local name=$1 prompts=$2; shift 2
    echo "--prompts-file $prompts --model $MODEL --output $(output "$name") --run-dir $(run_dir "$name")" \
        "--ignore-eos --seed 11 $*"
}

# ---------------------------------------------------------------- a run that is killed again and again

# killed_run NAME PROMPTS KILLS MILLISECONDS_MAX: starts the run on a random number of nodes with random numbers of ranks
# and sequences, kills it in a random way after a random time, KILLS times or until it is over, and lets it finish then.
# $SEED sets what is drawn; the moments are those of the machine. How many kills there were lands in $kills_done.
killed_run() {
    local name=$1 prompts=$2 kills=$3 ms_max=$4
    local how nodes ranks batch delay_ms victim stays spare job="" job_nodes=4
    local deck=() last_launch=none lost_total=0 records started=$SECONDS
    declare -A kinds=()
    records=$(grep -c . "$prompts")
    mkdir -p "$SCRATCH/$name"
    write_job > "$SCRATCH/$name/job.sh"
    say "SEED=$SEED, $records records, $kills kills"
    RANDOM=$SEED
    kills_done=0
    start_or_go_on
    while [ $kills_done -lt "$kills" ] && strike; do
        account
        start_or_go_on
    done
    eventually 600 is_at_its_end || true
    is_over || fail "the last job is $(job_state "$job"): $(tail -n 3 "$(log_of "$job")")"
    say "$kills_done kills (rank ${kinds[rank]:-0}, node ${kinds[node]:-0}, cancel ${kinds[cancel]:-0}, requeue" \
        "${kinds[requeue]:-0}) in $((SECONDS - started)) s: of $records records $lost_total were generated again," \
        "$(frames "$SAVED" "$name") unfinished texts were saved, $(status_of "$name" duplicates) duplicates"
}

# The template, with what is drawn for each start, those after a requeue among them: ranks on some of the job's nodes.
write_job() {
    echo '#!/bin/bash'
    grep '^#SBATCH' "$APPS/share/farm/slurm/farm-cpu.sbatch"
    echo ". $SCRATCH/$name/drawn"
    # shellcheck disable=SC2016 # for the job
    echo 'export FARM_SRUN_ARGS="--mpi=pmix -N $nodes -n $ranks" FARM_MAX_BATCH_SIZE=$batch'
    echo "exec bash $APPS/share/farm/slurm/farm-cpu.sbatch \"\$@\""
}

# What the next launch is like and how it ends. Every way to kill comes once before one comes again.
draw() {
    [ ${#deck[@]} -gt 0 ] || deck=(rank node cancel requeue)
    local card=$((RANDOM % ${#deck[@]}))
    how=${deck[card]}
    unset "deck[card]"
    deck=("${deck[@]}")
    nodes=$((RANDOM % 4 + 1)) batch=$((RANDOM % 8 + 1))
    ranks=$((nodes + RANDOM % (nodes + 1))) spare=$((RANDOM % 2))
    delay_ms=$(((RANDOM * 32768 + RANDOM) % ms_max)) victim=$RANDOM stays=$((RANDOM % 2))
}

log_of() { echo "$SCRATCH/$name/job-$1.log"; }

# A job that queued itself again after its kill, or was requeued, goes on half the time, else another job does. Half
# of these do without the first node, so that another host takes over.
start_or_go_on() {
    local without=()
    draw
    if [ -n "$job" ] && job_is "$job" PENDING; then
        if [ "$stays" = 1 ]; then
            write_drawn
            cluster hurry "$job" || fail "job $job does not come back"
            return
        fi
        login scancel "$job"
    fi
    job_nodes=$((4 - spare))
    [ $spare = 0 ] || without=(--exclude=n1)
    write_drawn
    # shellcheck disable=SC2046 # a list of arguments
    job=$(login sbatch --parsable -N $job_nodes "${without[@]}" --ntasks-per-node=2 --output="$(log_of %j)" \
        "$SCRATCH/$name/job.sh" $(long_arguments "$name" "$prompts"))
    eventually 30 job_is "$job" RUNNING || fail "job $job is $(job_state "$job")"
}

write_drawn() {
    [ "$nodes" -le $job_nodes ] || nodes=$job_nodes
    [ "$ranks" -le $((2 * nodes)) ] || ranks=$((2 * nodes))
    echo "nodes=$nodes ranks=$ranks batch=$batch" > "$SCRATCH/$name/drawn"
}

# The processes of farm on all nodes, or on the node given, as the login node (that node) counts them.
farm_processes() {
    local where=(login)
    [ $# = 0 ] || where=(node "$1")
    "${where[@]}" sh -c 'grep -lx farm /proc/[0-9]*/comm 2> /dev/null || true' | cut -d/ -f3
}

farm_runs() { [ -n "$(farm_processes)" ]; }

# Kills the job as $how says, and waits until nothing of it is left. Fails where the run is over before.
strike() {
    sleep "$((delay_ms / 1000)).$(printf %03d $((delay_ms % 1000)))"
    case $how in
        rank | node) eventually 20 farm_runs_or_is_over || fail "no farm runs: $(tail -n 3 "$(log_of "$job")" | xargs)" ;;
    esac
    ! is_over || return 1
    "strike_$how" || return 1
    kills_done=$((kills_done + 1))
    kinds[$how]=$((${kinds[$how]:-0} + 1))
    # A job that ends while it is being cancelled may stay in COMPLETING until Slurm asks its nodes again, minutes later.
    eventually 300 at_rest || fail "after kill $kills_done ($how) job $job is $(job_state "$job")"
}

is_at_its_end() { case $(job_state "$job") in PENDING | RUNNING | COMPLETING | CONFIGURING) return 1 ;; esac; }
is_over() { job_is "$job" COMPLETED; }
farm_runs_or_is_over() { farm_runs || is_over; }

strike_rank() {
    local pids
    mapfile -t pids < <(farm_processes)
    [ ${#pids[@]} -gt 0 ] || return 1
    # shellcheck disable=SC2016 # for that shell
    login sh -c 'kill -KILL "$0"' "${pids[victim % ${#pids[@]}]}" || true
}

strike_node() {
    local host hosts=() pids
    for host in n1 n2 n3 n4; do [ -z "$(farm_processes "$host")" ] || hosts+=("$host"); done
    [ ${#hosts[@]} -gt 0 ] || return 1
    host=${hosts[victim % ${#hosts[@]}]}
    pids=$(farm_processes "$host")
    # shellcheck disable=SC2016,SC2086 # for that shell; a list
    node "$host" sh -c 'kill -KILL "$@"' sh $pids || true
}

strike_cancel() { login scancel "$job"; }
strike_requeue() { login scontrol requeue "$job"; }

at_rest() {
    case $(job_state "$job") in RUNNING | COMPLETING | CONFIGURING | STAGE_OUT) return 1 ;; esac
    ! farm_runs
}

# What this kill cost: of its launch the records that were begun, and neither done nor saved. Where a signal came
# before the end there are none; else no more than were in work at once.
account() {
    local launch lost most finished saved
    launch=$(find "$(run_dir "$name")/claims" -name 'owner-*.json' 2> /dev/null | sort | tail -n 1 | grep -oE '[0-9]{5}' || true)
    # It may have come to its end before it had a part in the run.
    if [ "${launch:=none}" = "$last_launch" ]; then launch=none; fi
    [ "$launch" = none ] || last_launch=$launch
    finished=$(($(frames "$FINISHED" "$name" "$launch") + $(frames "$FAILED" "$name" "$launch")))
    saved=$(frames "$SAVED" "$name" "$launch")
    lost=$(($(frames "$STARTED" "$name" "$launch") - finished - saved))
    most=$((ranks * batch))
    case $how in cancel | requeue) most=0 ;; esac
    say "$(printf 'kill %2d: %-7s after %5d ms, %d ranks x %d on %d nodes from n%d: launch %s: %4d records, %2d saved, %2d lost; %s' \
        "$kills_done" "$how" "$delay_ms" "$ranks" "$batch" "$nodes" $((5 - job_nodes)) "$launch" "$finished" "$saved" "$lost" "$(said_at_start)")"
    [ "$lost" -le "$most" ] || fail "kill $kills_done ($how) lost $lost records, more than $most"
    lost_total=$((lost_total + lost))
}

# What farm printed of the launches before, at its last start in this job.
said_at_start() {
    { grep -oE 'going on with the run: .*' "$(log_of "$job")" 2> /dev/null || echo "said nothing"; } | tail -n 1 |
        sed -E 's/going on with the run: ([0-9]+) records are done, ([0-9]+) unfinished texts go on, ([0-9]+) records .*/it began with \1 done, \2 saved, \3 lost/'
}
