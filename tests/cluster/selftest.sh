#!/usr/bin/env bash
# Shows that cluster.sh is a cluster: what the end-to-end tests of farm rely on, tried without farm.
#
#   tests/cluster/selftest.sh            all of it, with a cluster of its own
#   ONLY=array,requeue tests/cluster/selftest.sh
#
# Exit: 0 passed, 1 failed, 77 this machine cannot run a cluster.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# batch NAME < BODY: writes the job script $SCRATCH/NAME.sbatch, whose output is $SCRATCH/NAME.out
batch() { { echo '#!/bin/bash'; cat; } > "$SCRATCH/$1.sbatch"; }

submit() {
    local name=$1; shift
    login sbatch --parsable --output="$SCRATCH/$name.out" --open-mode=append "$@" "$SCRATCH/$name.sbatch"
}

job_state() { login squeue -h -j "$1" -t all -o %T | head -n 1; }
job_is() { [ "$(job_state "$1")" = "$2" ]; }

test_srun_on_four_nodes() {
    expect "host names" "n1 n2 n3 n4" "$(login srun -N4 --mpi=pmix hostname | sort | xargs)"
}

test_nodes_have_their_own_memory_and_tmp() {
    local folder
    for folder in /dev/shm /tmp /var/tmp; do
        node n1 touch "$folder/only-on-n1"
        node n1 test -e "$folder/only-on-n1"
        if node n2 test -e "$folder/only-on-n1"; then fail "n2 sees $folder of n1"; fi
        if [ -e "$folder/only-on-n1" ]; then fail "the machine sees $folder of n1"; fi
    done
    touch "$SCRATCH/everywhere"
    node n3 test -e "$SCRATCH/everywhere"
}

test_mpi_splits_by_node() {
    command -v mpicc > /dev/null || skip "no mpicc"
    mpicc -O1 -o "$SCRATCH/split" "$HERE/split.c"
    expect srun "8 ranks 4 nodes 2 per node" "$(login srun -N4 -n8 --mpi=pmix "$SCRATCH/split")"
    expect mpirun "4 ranks 1 nodes 4 per node" "$(login mpirun -n 4 "$SCRATCH/split")"
}

# Whether SLURM_PMIX_FENCE, which cluster.sh sets, does what it is for.
test_mpi_start_waits_for_a_late_rank() {
    [ -x "$SCRATCH/split" ] || skip "no mpicc"
    local rank
    for rank in 0 3 6; do
        expect "rank $rank late" "8 ranks 4 nodes 2 per node" \
            "$(login env LATE_RANK=$rank srun -N4 -n8 --mpi=pmix "$SCRATCH/split")"
    done
}

test_mpirun_inside_a_job() {
    [ -x "$SCRATCH/split" ] || skip "no mpicc"
    echo "mpirun $SCRATCH/split" | batch mpirun
    submit mpirun --wait -N2 --ntasks-per-node=2 > /dev/null
    expect_match mpirun "^4 ranks 2 nodes 2 per node$" "$SCRATCH/mpirun.out"
}

test_array() {
    echo 'echo task $SLURM_ARRAY_TASK_ID' | batch array
    submit array --wait --array=1-3 > /dev/null
    expect "array tasks" "task 1 task 2 task 3" "$(sort "$SCRATCH/array.out" | xargs)"
}

test_scancel() {
    echo 'srun sleep 60' | batch cancelled
    local job
    job=$(submit cancelled -N2)
    eventually 10 job_is "$job" RUNNING
    login scancel "$job"
    eventually 10 job_is "$job" CANCELLED
}

test_signal_reaches_the_batch_shell_and_the_step() {
    batch signalled <<'END'
srun bash -c 'trap "echo the step got USR1; exit 0" USR1; sleep 60 & wait' & step=$!
trap 'echo the shell got USR1; kill -USR1 $step' USR1
wait $step
wait $step
END
    local job
    job=$(submit signalled)
    eventually 10 login scontrol show step "$job.0"
    sleep 0.5
    login scancel --batch --signal=USR1 "$job"
    eventually 10 grep -q "the step got USR1" "$SCRATCH/signalled.out"
    expect_match "batch shell" "the shell got USR1" "$SCRATCH/signalled.out"
}

test_requeue() {
    batch requeued <<'END'
echo "start ${SLURM_RESTART_COUNT:-0}"
[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || scontrol requeue "$SLURM_JOB_ID"
END
    local job
    job=$(submit requeued --requeue)
    cluster hurry "$job"
    eventually 20 grep -q "start 1" "$SCRATCH/requeued.out"
}

test_gpus_are_counted() {
    expect "GPUs seen" "0,1" "$(login srun --gpus-per-node=2 printenv CUDA_VISIBLE_DEVICES)"
}

# sbcast runs inside an allocation and sends the file from the batch node to the others.
test_limit_slows_a_link() {
    head -c 8M /dev/urandom > "$SCRATCH/payload"
    batch limited <<END
start=\$(date +%s%N); sbcast -f $SCRATCH/payload /dev/shm/payload; echo ms \$(((\$(date +%s%N) - start) / 1000000))
END
    cluster limit all 20mbit
    submit limited --wait -N2 > /dev/null
    cluster limit all none
    local ms
    ms=$(awk '/^ms/ {print $2}' "$SCRATCH/limited.out")
    # 64 Mbit over 20 Mbit/s
    [ "$ms" -ge 2500 ] || fail "8 MiB over 20 Mbit/s took only $ms ms"
}

test_up_again_keeps_a_running_cluster() {
    touch "$SCRATCH/kept"
    cluster up 4
    test -e "$SCRATCH/kept"
}

test_a_crashed_node_is_noticed() {
    cluster crash n4
    expect "the others" "n1 n2 n3" "$(login srun -N3 -x n4 hostname | sort | xargs)"
}

test_up_after_a_killed_cluster() {
    kill -KILL "$(cut -d' ' -f1 "$FARM_CLUSTER_DIR/run/login.pid")"
    cluster up 2
    expect "host names" "n1 n2" "$(login srun -N2 hostname | sort | xargs)"
}

test_down_leaves_nothing() {
    local pid
    pid=$(cut -d' ' -f1 "$FARM_CLUSTER_DIR/run/login.pid")
    cluster down
    test ! -e "/proc/$pid"
    test ! -e "$FARM_CLUSTER_DIR"
    if grep -q "$FARM_CLUSTER_DIR" /proc/mounts; then fail "mounts are left over"; fi
}

own_cluster "/var/tmp/farm-selftest-$(id -u)" 4
run_tests srun_on_four_nodes nodes_have_their_own_memory_and_tmp mpi_splits_by_node \
    mpi_start_waits_for_a_late_rank mpirun_inside_a_job array scancel \
    signal_reaches_the_batch_shell_and_the_step requeue gpus_are_counted limit_slows_a_link \
    up_again_keeps_a_running_cluster a_crashed_node_is_noticed up_after_a_killed_cluster down_leaves_nothing
finish
