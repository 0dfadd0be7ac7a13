# shellcheck shell=bash
# What farm's batch templates share, sourced by them on the job's first node: start farm on all nodes of the job,
# warn it in time when the job must end, and queue the job again where farm has not finished.
#
# Settings, all optional, from the environment of sbatch:
#   FARM_ARGS            arguments for farm, put before those after the script's name (split at blanks, no quoting)
#   FARM_LAUNCHER        srun (default) or mpirun
#   FARM_SRUN_ARGS       default "--mpi=pmix --cpu-bind=cores"; set it where the site's MPI wants another
#   FARM_MPIRUN_ARGS     default "--bind-to none"
#   FARM_MODULES         modules to load, default farm/@VERSION@ where there is such a module
#   FARM_MAX_RESTARTS    how often the job may queue itself again, default 20; 0: never
#   FARM_REQUEUE_CODE    farm's exit code for "stopped early, a rerun goes on", default 75
#   FARM_PROMPTS_PATTERN array jobs: the prompts file of each task, e.g. "prompts-%a.jsonl"

farm_say() { echo "farm-job: $*" >&2; }

# The farm module brings the MPI module it was built with. Without module files, FARM_ROOT alone must do.
farm_load_modules() {
    local modules=${FARM_MODULES:-farm/@VERSION@} init
    case ":${LOADEDMODULES:-}:" in *":farm/"* | *":farm:"*) return 0 ;; esac
    for init in "${MODULESHOME:-/none}/init/bash" /etc/profile.d/{lmod,z00_lmod,modules}.sh; do
        type module > /dev/null 2>&1 && break
        # shellcheck disable=SC1090 # the site's own
        [ ! -r "$init" ] || . "$init"
    done
    type module > /dev/null 2>&1 || return 0
    # shellcheck disable=SC2086 # a list of modules
    if [ -n "${FARM_MODULES:-}" ] || module is-avail $modules > /dev/null 2>&1; then
        module load $modules
    fi
}

# The least CPUs of any node over the most tasks of any node: what every task of the step can have. Slurm does
# not hand --cpus-per-task on to srun, and an srun without it gets one CPU a task.
farm_cpus_per_task() {
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
        echo "$SLURM_CPUS_PER_TASK"
        return
    fi
    local cpus tasks
    cpus=$(farm_counts "${SLURM_JOB_CPUS_PER_NODE:-1}" | head -n 1)
    tasks=$(farm_counts "${SLURM_TASKS_PER_NODE:-1}" | tail -n 1)
    echo $((cpus > tasks ? cpus / tasks : 1))
}

# "36,72(x2)" as sorted lines: 36, 72
farm_counts() { tr ',' '\n' <<< "$1" | sed 's/(.*//' | sort -n; }

# What starts farm, as the array farm_launcher.
farm_choose_launcher() {
    local srun_args mpirun_args
    read -ra srun_args <<< "${FARM_SRUN_ARGS:---mpi=pmix --cpu-bind=cores}"
    read -ra mpirun_args <<< "${FARM_MPIRUN_ARGS:---bind-to none}"
    farm_not_started=
    case ${FARM_LAUNCHER:-srun} in
        srun)
            farm_launcher=(srun --kill-on-bad-exit=1 --cpus-per-task="$(farm_cpus_per_task)" "${srun_args[@]}")
            # Every rank must see all GPUs of its node, else NCCL cannot connect them; farm gives each rank its own.
            [ -z "${SLURM_GPUS_ON_NODE:-}${SLURM_JOB_GPUS:-}" ] || farm_launcher+=(--gpu-bind=none)
            # srun exits with 0 when a node could not start the step, so the tasks leave a sign: the file goes.
            farm_not_started=$(mktemp)
            # shellcheck disable=SC2016 # for the shell in the step
            farm_launcher+=(sh -c 'rm -f "$0"; exec "$@"' "$farm_not_started") ;;
        mpirun)
            farm_launcher=(mpirun ${SLURM_NTASKS:+-n "$SLURM_NTASKS"} "${mpirun_args[@]}") ;;
        *)
            farm_say "FARM_LAUNCHER is srun or mpirun, not '$FARM_LAUNCHER'"
            return 2 ;;
    esac
}

# In an array job, %a in any argument is the task's id, and %4a the id with leading zeros to four digits.
farm_expand_array_id() {
    local text=$1 id
    while [[ $text =~ ^(.*)%([0-9]*)a(.*)$ ]]; do
        printf -v id "%0${BASH_REMATCH[2]:-1}d" "$SLURM_ARRAY_TASK_ID"
        text=${BASH_REMATCH[1]}$id${BASH_REMATCH[3]}
    done
    printf '%s' "$text"
}

# The id that scontrol takes: an element of an array has a name of its own.
farm_job_id() {
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# Signals go to farm as USR1, on which it keeps what is complete and leaves with the requeue code: mpirun answers
# TERM with KILL within seconds.
farm_on_warning() {
    farm_signalled=1
    farm_say "the job's time is nearly up; farm saves its work and stops"
    kill -USR1 "$farm_pid" 2> /dev/null
}

# TERM comes from scancel, from preemption or at the time limit. Who cancels a job does not want it back, and
# Slurm itself requeues what it preempts.
farm_on_term() {
    farm_signalled=1 farm_cancelled=1
    farm_say "the job is being stopped"
    kill -USR1 "$farm_pid" 2> /dev/null
}

# bash runs a trap only between commands or in `wait`, which the trap then interrupts: hence the loop.
farm_wait() {
    local status
    while :; do
        farm_signalled=0
        wait "$farm_pid"
        status=$?
        [ "$farm_signalled" = 1 ] || return $status
    done
}

farm_requeue() {
    local restarts=${SLURM_RESTART_COUNT:-0} most=${FARM_MAX_RESTARTS:-20}
    if [ "$farm_cancelled" = 1 ]; then
        farm_say "not finished; the same sbatch command goes on from here"
    elif [ "$restarts" -ge "$most" ]; then
        farm_say "not finished after $restarts restarts (FARM_MAX_RESTARTS=$most); the same sbatch command goes on"
    else
        farm_say "not finished; restart $((restarts + 1)) of at most $most"
        scontrol requeue "$(farm_job_id)" ||
            farm_say "this site does not let a job requeue itself; the same sbatch command goes on"
    fi
}

# --force-new means the first start: a restarted job would set its own work aside.
farm_keep_own_work() {
    local argument kept=()
    [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || return 0
    unset FARM_FORCE_NEW
    for argument in "${farm_arguments[@]}"; do [ "$argument" = --force-new ] || kept+=("$argument"); done
    farm_arguments=("${kept[@]}")
}

# The arguments of this job, as the array farm_arguments.
farm_collect_arguments() {
    local argument
    read -ra farm_arguments <<< "${FARM_ARGS:-}"
    farm_arguments+=("$@")
    farm_keep_own_work
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
    [ -z "${FARM_PROMPTS_PATTERN:-}" ] || farm_arguments+=(--prompts-file "$FARM_PROMPTS_PATTERN")
    set -- "${farm_arguments[@]}"
    farm_arguments=()
    for argument; do farm_arguments+=("$(farm_expand_array_id "$argument")"); done
}

# farm_job ARG…: runs farm with these arguments; returns farm's exit code.
farm_job() {
    local status
    farm_load_modules
    farm_collect_arguments "$@"
    farm_choose_launcher || return
    farm_say "job $(farm_job_id) on ${SLURM_JOB_NODELIST:-?}, start $((${SLURM_RESTART_COUNT:-0} + 1)), by" \
        "${FARM_LAUNCHER:-srun}: farm ${farm_arguments[*]}"
    # Slurm's tree fence, a part of its default, does not wait for a late rank, which then crashes in MPI_Init.
    export SLURM_PMIX_FENCE=${SLURM_PMIX_FENCE:-ring}
    farm_cancelled=0
    trap farm_on_warning USR1
    trap farm_on_term TERM
    "${farm_launcher[@]}" "$FARM_ROOT/bin/farm" "${farm_arguments[@]}" &
    farm_pid=$!
    farm_wait
    status=$?
    if [ -e "$farm_not_started" ]; then
        farm_say "srun did not start farm on this node (its exit code: $status)"
        rm -f "$farm_not_started"
        [ "$status" != 0 ] || status=1
    fi
    [ "$status" != "${FARM_REQUEUE_CODE:-75}" ] || farm_requeue
    return "$status"
}
