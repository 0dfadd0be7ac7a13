# shellcheck shell=bash
# What farm's batch templates share, sourced by them on the job's first node: start farm on all nodes of the job,
# warn it in time when the job must end, queue the job again where farm has not finished, and say what ended it.
#
# Settings, all optional, from the environment of sbatch:
#   FARM_ARGS            arguments for farm, put before those after the script's name (split at blanks, no quoting)
#   FARM_LAUNCHER        srun (default) or mpirun
#   FARM_SRUN_ARGS       default "--mpi=pmix --cpu-bind=cores"; set it where the site's MPI wants another
#   FARM_MPIRUN_ARGS     default "--bind-to none"
#   FARM_MODULES         modules to load, default farm/@VERSION@ where there is such a module
#   FARM_MAX_RESTARTS    how often the job may queue itself again, default 20; 0: never
#   FARM_REQUEUE_CODE    farm's exit code for "stopped early, a rerun goes on", default 75
#   FARM_PROMPTS_PATTERN array jobs: the prompts file of each task, e.g. "prompts-%a.jsonl"; without it and without
#                        %a in the arguments all tasks work on one run

farm_goes_on="the same sbatch command goes on from what is saved"
farm_more_memory="ask for more memory (--mem), start fewer ranks a node (--ntasks-per-node), or lower \
--max-batch-size or --kv-cache-memory"
farm_more_memory_to_train="ask for more memory (--mem), give --recompute full, lower --micro-batch-size or --max-seq-len, \
or raise --tensor-parallel"
# How long before the end the template has Slurm warn, seconds: its --signal.
farm_warned_seconds=120

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
    if farm_warned_too_early; then
        farm_say "a short job: Slurm warned it at once; farm looks at the time limit itself"
        return
    fi
    farm_say "the job's time is nearly up; farm saves its work and stops"
    kill -USR1 "$farm_pid" 2> /dev/null
}

# Slurm warns a job that is shorter than the time of its --signal as it starts. farm stops by itself before the limit,
# so of a short job's first half nothing is given away. Somebody who sends USR1 by hand is heard.
farm_warned_too_early() {
    local end left
    end=${SLURM_JOB_END_TIME:-$(date +%s -d "$(timeout 10 squeue -h -j "$(farm_job_id)" -o %e)" 2> /dev/null)}
    left=$((${end:-0} - $(date +%s)))
    [ "$left" -gt "$SECONDS" ] && [ "$left" -le $((farm_warned_seconds + 60)) ]
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

# farm_requeue WHY: queues the job again where that is wanted.
farm_requeue() {
    local restarts=${SLURM_RESTART_COUNT:-0} most=${FARM_MAX_RESTARTS:-20}
    if [ "$farm_cancelled" = 1 ]; then
        farm_say "$1; $farm_goes_on"
    elif [ "$restarts" -ge "$most" ]; then
        farm_say "$1 after $restarts restarts (FARM_MAX_RESTARTS=$most); $farm_goes_on"
    else
        farm_say "$1; restart $((restarts + 1)) of at most $most"
        scontrol requeue "$(farm_job_id)" || farm_say "this site does not let a job requeue itself; $farm_goes_on"
    fi
}

# Processes of this job on this node that the kernel's out-of-memory killer has ended. The job's control group counts
# those of its steps; that of version 1 does not, and there Slurm alone knows.
farm_oom_kills() {
    local groups kills=0
    groups=$(cat /proc/self/cgroup 2> /dev/null)
    if [[ $groups =~ (^|$'\n')0::(/[^$'\n']*/job_[0-9]+)($|[/$'\n']) ]]; then
        kills=$(sed -n 's/^oom_kill //p' "/sys/fs/cgroup${BASH_REMATCH[2]}/memory.events" 2> /dev/null)
    fi
    echo "${kills:-0}"
}

# Whether that killer was at work. The exit code does not tell: srun makes a 1 of it, mpirun a 137. About other nodes
# the accounting knows, where the site has one.
farm_is_oom() {
    [ "$(farm_oom_kills)" -gt "$farm_oom_before" ] ||
        timeout 10 sacct -nP -j "$SLURM_JOB_ID" -o State 2> /dev/null | grep -q '^OUT_OF_ME'
}

# farm_conclude STATUS: what farm's exit code means for the job.
farm_conclude() {
    if [ "$1" = "${FARM_REQUEUE_CODE:-75}" ]; then
        farm_requeue "not finished"
        return
    fi
    case $1 in 0 | 2 | 3 | 4) return ;; esac
    if farm_is_oom; then
        farm_say "the kernel's out-of-memory killer ended a process of this job: $farm_more_memory; $farm_goes_on"
        return
    fi
    case $1 in
        # By KILL or BUS, as when a node or its file system is lost; a restart can do better. TERM is no sign of that:
        # srun ends the other ranks so when one rank leaves with an error.
        137 | 135)
            [ "$farm_cancelled" = 1 ] ||
                farm_say "a process of farm was killed (exit code $1). If for want of memory, $farm_more_memory"
            farm_requeue "not finished" ;;
        # A fault of farm, of the machine or of the file system would most likely come again.
        *) farm_say "farm failed (exit code $1), see above; $farm_goes_on" ;;
    esac
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
    # A subcommand comes first.
    case ${1:-} in
        '' | -*) ;;
        *) farm_arguments=("$1" "${farm_arguments[@]}"); shift ;;
    esac
    farm_arguments+=("$@")
    [ "${farm_arguments[0]:-}" != finetune ] || farm_more_memory=$farm_more_memory_to_train
    farm_keep_own_work
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
    [ -z "${FARM_PROMPTS_PATTERN:-}" ] || farm_arguments+=(--prompts-file "$FARM_PROMPTS_PATTERN")
    set -- "${farm_arguments[@]}"
    farm_arguments=()
    for argument; do farm_arguments+=("$(farm_expand_array_id "$argument")"); done
}

# farm_job ARG…: runs farm with these arguments; returns farm's exit code.
farm_job() {
    local status farm_oom_before
    farm_load_modules
    farm_collect_arguments "$@"
    farm_choose_launcher || return
    farm_say "job $(farm_job_id) on ${SLURM_JOB_NODELIST:-?}, start $((${SLURM_RESTART_COUNT:-0} + 1)), by" \
        "${FARM_LAUNCHER:-srun}: farm ${farm_arguments[*]}"
    # Slurm's tree fence, a part of its default, does not wait for a late rank, which then crashes in MPI_Init.
    export SLURM_PMIX_FENCE=${SLURM_PMIX_FENCE:-ring}
    farm_cancelled=0
    farm_oom_before=$(farm_oom_kills)
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
    farm_conclude "$status"
    return "$status"
}
