#!/usr/bin/env bash
# A real Slurm cluster on one Linux machine, for tests: slurmctld, munged and one slurmd a node, each node in
# namespaces of its own, so that it has its own host name, address, /dev/shm, /tmp, /var/tmp and process ids.
#
#   cluster.sh up [NODES]          start it (default 4 nodes: n1 n2 …); does nothing when it already runs so
#   cluster.sh down                stop it and remove everything it made
#   cluster.sh status              its nodes and jobs
#   cluster.sh exec CMD…           run CMD on the login node (sbatch, srun, mpirun, …)
#   cluster.sh env                 print the environment that exec adds, as export lines
#   cluster.sh nodesh NODE CMD…    run CMD inside a node, e.g. `nodesh n1 ls /dev/shm`
#   cluster.sh limit NODE|all RATE limit a node's link, both ways (`1gbit`, `200mbit`; `none` lifts it)
#   cluster.sh hurry JOB           let a requeued job start now; Slurm holds it back for two minutes
#   cluster.sh crash NODE          kill a node and all that runs on it, as a power cut would
#
# Settings (environment): FARM_CLUSTER_DIR (default /var/tmp/farm-cluster-$UID), FARM_CLUSTER_CPUS a node (2),
# FARM_CLUSTER_SHM, the size of a node's /dev/shm (1g), FARM_CLUSTER_GPUS, pretended GPUs a node (2, at most 4).
# $FARM_CLUSTER_DIR/scratch is the "parallel file system": every node sees it.
#
# Exit code 77: this machine cannot run it; the one line on stderr says why.
#
# How it keeps apart from the machine it runs on: the login node is process 1 of a PID namespace that also owns
# the bridge and all the nodes. Nothing has a name outside (no `ip netns`, no links, no mounts, no ports), so
# it collides with nothing, and killing that one process makes the kernel remove the whole cluster.
set -euo pipefail

SELF=$(readlink -f "${BASH_SOURCE[0]}")
readonly SELF
readonly DIR=${FARM_CLUSTER_DIR:-/var/tmp/farm-cluster-$UID}
readonly CPUS=${FARM_CLUSTER_CPUS:-2}
readonly SHM=${FARM_CLUSTER_SHM:-1g}
readonly GPUS=${FARM_CLUSTER_GPUS:-2}
readonly SUBNET=10.77.0          # inside our own network namespaces only
readonly UP_SECONDS_MAX=30
# Slurm's daemons live in sbin, which is not on every user's PATH.
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say()   { printf 'cluster: %s\n' "$*" >&2; }
die()   { say "$*"; exit 1; }
skip()  { say "skipped: $*"; exit 77; }

# ---------------------------------------------------------------- what the machine must offer

require_machine() {
    [ "$(uname -s)" = Linux ] || skip "needs Linux"
    [ "$(id -u)" = 0 ] || skip "needs root (slurmd and namespaces)"
    local tool missing=""
    for tool in slurmctld slurmd sinfo srun munged unshare nsenter ip tc flock; do
        command -v "$tool" >/dev/null || missing+=" $tool"
    done
    [ -z "$missing" ] || skip "not installed:$missing"
    unshare -n -u -m -i -p --fork true 2>/dev/null || skip "namespaces are forbidden here"
    unshare -n -m sh -c 'ip link add veth0 type veth peer name veth1 && ip link add br0 type bridge' 2>/dev/null ||
        skip "veth or bridge links are forbidden here"
    unshare -m mount -t tmpfs tmpfs /mnt 2>/dev/null || skip "mounts are forbidden here"
}

# ---------------------------------------------------------------- processes: one record a namespace's process 1

# Writes "pid starttime" of this very process as the starter's /proc (not yet replaced by our own) shows it.
record_self() {
    local stat
    read -r stat < /proc/self/stat
    started_at "$stat" > "$DIR/run/$1.pid.new"
    mv "$DIR/run/$1.pid.new" "$DIR/run/$1.pid"
}

# "pid starttime" out of a /proc/PID/stat line; the two together never name another process.
started_at() {
    local fields
    read -ra fields <<< "${1##*) }"
    echo "${1%% *} ${fields[19]}"
}

login_alive() {
    local record stat
    record=$(cat "$DIR/run/login.pid" 2>/dev/null) || return 1
    read -r stat 2>/dev/null < "/proc/${record%% *}/stat" || return 1
    [ "$(started_at "$stat")" = "$record" ]
}

pid_of() { cut -d' ' -f1 "$DIR/run/$1.pid"; }

# Runs a command in the login node's namespaces, in the caller's folder.
enter_login() {
    login_alive || die "not running (cluster.sh up)"
    nsenter_at "$(pid_of login)" sh -c 'cd "$0" 2>/dev/null || cd /; exec "$@"' "$PWD" "$@"
}

nsenter_at() {
    local pid=$1; shift
    nsenter --target "$pid" --mount --uts --ipc --net --pid -- "$@"
}

# A node's pid is known as the login node counts it, so the way in leads through the login node.
enter_node() {
    local node=$1; shift
    [ -f "$DIR/run/$node.pid" ] || die "no node $node"
    enter_login nsenter --target "$(pid_of "$node")" --mount --uts --ipc --net --pid -- "$@"
}

node_names() { seq -f 'n%g' 1 "$(cat "$DIR/nodes")"; }

# ---------------------------------------------------------------- configuration

environment() {
    cat <<END
export SLURM_CONF=$DIR/etc/slurm.conf
export FARM_CLUSTER_DIR=$DIR
export FARM_CLUSTER_SCRATCH=$DIR/scratch
export PATH=\$PATH:/usr/local/sbin:/usr/sbin:/sbin
# root, and more ranks than cores, are normal here
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1
# Slurm 22.05's tree fence, a part of its default, does not wait for a late rank: others leave MPI_Init before
# it, and it crashes there, as Open MPI's TCP gets a message that it has no handler for yet
export SLURM_PMIX_FENCE=ring
# our munged is not at the socket that PMIx would ask
export PMIX_MCA_psec=native
END
}

write_hosts() {
    echo "127.0.0.1 localhost"
    echo "$SUBNET.1 login"
    local i
    for i in $(seq "$1"); do echo "$SUBNET.$((10 + i)) n$i"; done
}

write_slurm_conf() {
    local nodes=$1 i
    cat <<END
ClusterName=farm
SlurmctldHost=login($SUBNET.1)
SlurmctldPort=6817
SlurmdPort=6818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/run/munge.socket
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
SwitchType=switch/none
MpiDefault=pmix
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/none
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_min_interval=0
ReturnToService=2
JobRequeue=1
# seconds; short, so that tests of signals and time limits are
KillWait=5
OverTimeLimit=0
CompleteWait=0
SlurmdTimeout=20
MinJobAge=600
UnkillableStepTimeout=30
GresTypes=gpu
END
    for i in $(seq "$nodes"); do
        echo "NodeName=n$i NodeAddr=$SUBNET.$((10 + i)) CPUs=$CPUS RealMemory=4000 Gres=gpu:$GPUS State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP"
    echo "PartitionName=short Nodes=n[1-$nodes] MaxTime=00:10:00 State=UP"
}

# Slurm wants a device file a GPU; these exist everywhere. Jobs get their share of CUDA_VISIBLE_DEVICES, and find
# no GPU behind it.
# (Not head: it would leave before the last line is written now and then, and fail the pipe.)
write_gres_conf() { printf 'Name=gpu File=%s\n' /dev/null /dev/zero /dev/full /dev/random | sed -n "1,${GPUS}p"; }

# slurmd asks its cgroup plugin even where nothing uses cgroups. This one starts with whatever the machine has
# mounted on /sys/fs/cgroup; the v2 plugin wants systemd or a writable tree.
write_cgroup_conf() { echo "CgroupPlugin=cgroup/v1"; }

prepare_dir() {
    local nodes=$1
    # the path of a Unix socket ends at 107 characters, and PMIx adds some forty
    [ ${#DIR} -le 64 ] || die "FARM_CLUSTER_DIR is too long for the sockets below it: $DIR"
    if [ -e "$DIR" ] && [ ! -e "$DIR/.farm-cluster" ] && [ -n "$(ls -A "$DIR")" ]; then
        die "$DIR exists and is not a cluster's folder; set FARM_CLUSTER_DIR"
    fi
    mkdir -p "$DIR"
    touch "$DIR/.farm-cluster"
    mkdir -p "$DIR"/{etc,run,log,state,spool,scratch}
    chmod 755 "$DIR" "$DIR"/{run,log}
    chmod 1777 "$DIR/scratch"
    (umask 077 && head -c 128 /dev/urandom > "$DIR/etc/munge.key")
    write_hosts "$nodes" > "$DIR/etc/hosts"
    write_slurm_conf "$nodes" > "$DIR/etc/slurm.conf"
    write_gres_conf > "$DIR/etc/gres.conf"
    write_cgroup_conf > "$DIR/etc/cgroup.conf"
    environment > "$DIR/etc/env"
    echo "$nodes" > "$DIR/nodes"
}

# ---------------------------------------------------------------- process 1 of the login node

login_main() {
    record_self login
    mount -t proc proc /proc
    hostname login
    mount --bind "$DIR/etc/hosts" /etc/hosts
    start_bridge
    start_munged
    local node
    for node in $(node_names); do start_node "$node"; done
    export SLURM_CONF=$DIR/etc/slurm.conf
    slurmctld -D -c > "$DIR/log/slurmctld.out" 2>&1 &
    stay
}

# Process 1 must live as long as its namespace, and bash, waiting, reaps the orphans it inherits.
stay() {
    sleep infinity &
    wait $!
}

start_bridge() {
    ip link set lo up
    ip link add name br0 type bridge
    ip addr add "$SUBNET.1/24" dev br0
    ip link set br0 up
}

start_munged() {
    munged --foreground --force --key-file="$DIR/etc/munge.key" --socket="$DIR/run/munge.socket" \
        --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/state/munge.seed" \
        > "$DIR/log/munged.out" 2>&1 &
    wait_for "munged" test -S "$DIR/run/munge.socket"
}

start_node() {
    local node=$1
    unshare -n -u -m -i -p --fork --kill-child "$BASH" "$SELF" __node "$node" \
        > "$DIR/log/$node.out" 2>&1 < /dev/null &
    wait_for "$node" test -s "$DIR/run/$node.pid"
    ip link add name "$node" type veth peer name eth0 netns "$(pid_of "$node")"
    ip link set "$node" master br0 up
}

# wait_for NAME CMD…: until CMD succeeds, a few seconds at most
wait_for() {
    local what=$1 tries=0; shift
    until "$@" 2>/dev/null; do
        tries=$((tries + 1))
        [ $tries -lt 200 ] || die "waited in vain for $what; see $DIR/log"
        sleep 0.05
    done
}

# ---------------------------------------------------------------- process 1 of a node

node_main() {
    local node=$1
    record_self "$node"
    mount -t proc proc /proc
    hostname "$node"
    mount -t tmpfs -o "size=$SHM,mode=1777" tmpfs /dev/shm
    private_folder "$node" /tmp
    private_folder "$node" /var/tmp
    wait_for "the link of $node" ip link show eth0
    ip link set lo up
    ip addr add "$(awk -v n="$node" '$2 == n {print $1}' "$DIR/etc/hosts")/24" dev eth0
    ip link set eth0 up
    export SLURM_CONF=$DIR/etc/slurm.conf
    mkdir -p "$DIR/spool/$node"
    slurmd -D &
    stay
}

# Covers FOLDER with a fresh tmpfs. Where the cluster's own folder lies in it, that is put back on top.
private_folder() {
    local node=$1 folder=$2 stand_in=$DIR/spool/$1-mount
    mkdir -p "$stand_in"
    mount -t tmpfs -o mode=1777 tmpfs "$stand_in"
    case $DIR in
        "$folder"/*)
            mkdir -p "$stand_in${DIR#"$folder"}"
            mount --bind "$DIR" "$stand_in${DIR#"$folder"}" ;;
    esac
    mount --rbind "$stand_in" "$folder"
}

# ---------------------------------------------------------------- the verbs

up() {
    local nodes=${1:-4}
    [[ $nodes =~ ^[1-9][0-9]?$ ]] || die "up takes a number of nodes, 1 to 99, not '$nodes'"
    require_machine
    exec 9> "$DIR.lock"
    flock 9
    if login_alive && [ "$(cat "$DIR/nodes")" = "$nodes" ] && [ "$(idle_nodes)" = "$nodes" ]; then
        say "already up: $nodes nodes, $DIR"
        return
    fi
    stop
    prepare_dir "$nodes"
    # setsid and closed descriptors: the cluster outlives this script and holds none of its pipes
    setsid unshare -n -u -m -i -p --fork --kill-child "$BASH" "$SELF" __login \
        > "$DIR/log/login.out" 2>&1 < /dev/null 9>&- &
    disown
    wait_until_idle "$nodes"
    say "up: $nodes nodes, $DIR"
}

idle_nodes() {
    enter_login timeout 5 env SLURM_CONF="$DIR/etc/slurm.conf" sinfo -h -p main -t idle -o %D 2>/dev/null |
        awk '{n += $1} END {print n + 0}'
}

wait_until_idle() {
    local nodes=$1 until=$((SECONDS + UP_SECONDS_MAX))
    while ! login_alive || [ "$(idle_nodes)" != "$nodes" ]; do
        if [ $SECONDS -ge $until ]; then
            tail -n 5 "$DIR"/log/* >&2 || true
            stop
            die "the nodes did not come up in $UP_SECONDS_MAX s"
        fi
        sleep 0.1
    done
}

down() {
    exec 9> "$DIR.lock"
    flock 9
    stop
    rm -f "$DIR.lock"
}

# Kills process 1 of the cluster, which ends every process, link and mount in it, and removes the folder.
stop() {
    if login_alive; then
        local pid
        pid=$(pid_of login)
        kill -KILL "$pid"
        wait_for "the end of the old cluster" test ! -e "/proc/$pid"
    fi
    [ ! -e "$DIR/.farm-cluster" ] || rm -rf --one-file-system "$DIR"
}

status() {
    login_alive || { echo "down"; return 3; }
    run_on_login sinfo -N -o '%N %t %P'
    run_on_login squeue -a
}

run_on_login() { enter_login "$BASH" -c '. "$0" && exec "$@"' "$DIR/etc/env" "$@"; }

run_on_node() {
    local node=$1; shift
    enter_node "$node" "$BASH" -c '. "$0" && exec "$@"' "$DIR/etc/env" "$@"
}

limit() {
    local where=$1 rate=$2 node
    [ "$where" != all ] || where=$(node_names)
    for node in $where; do
        limit_link "$rate" "$node" enter_login
        limit_link "$rate" eth0 enter_node "$node"
    done
}

# limit_link RATE DEVICE RUNNER…: RUNNER runs a command where the device is
limit_link() {
    local rate=$1 device=$2; shift 2
    "$@" tc qdisc del dev "$device" root 2>/dev/null || true
    [ "$rate" = none ] || "$@" tc qdisc add dev "$device" root tbf rate "$rate" burst 256kb latency 50ms
}

crash() {
    [ -f "$DIR/run/$1.pid" ] || die "no node $1"
    enter_login kill -KILL "$(pid_of "$1")"
    rm -f "$DIR/run/$1.pid"
}

# Slurm means the two minutes for the old steps to end: one that is still there would break the new start, and for
# a second a node takes the new credential for the revoked one. The end of the old batch step sets the time once
# more, hence asking until the job has left.
hurry() {
    local job=$1
    wait_for "the requeue of job $job" waits_requeued "$job"
    wait_for "the end of the old steps of job $job" no_steps_left "$job"
    sleep 2
    wait_for "the start of job $job" started_after_update "$job"
}

waits_requeued() { run_on_login scontrol -o show job "$1" | grep -qE 'JobState=PENDING .*Restarts=[1-9]'; }

started_after_update() {
    waits_requeued "$1" || return 0
    run_on_login scontrol update JobId="$1" StartTime=now
    sleep 0.5
    return 1
}

# Each step has its sockets in the node's spool folder while it lives: n1_7.0 and stepd.slurm.pmix.7.0.
no_steps_left() { ! compgen -G "$DIR/spool/*/*[_.]$1.*" > /dev/null; }

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$SELF"; }

main() {
    local verb=${1:-help}
    [ $# -eq 0 ] || shift
    case $verb in
        up)      up "$@" ;;
        down)    down ;;
        status)  status ;;
        env)     environment ;;
        exec)    [ $# -gt 0 ] || die "exec needs a command"; run_on_login "$@" ;;
        nodesh)  [ $# -gt 1 ] || die "nodesh needs a node and a command"; run_on_node "$@" ;;
        limit)   [ $# -eq 2 ] || die "limit needs a node (or all) and a rate"; limit "$@" ;;
        hurry)   [ $# -eq 1 ] || die "hurry needs a job"; hurry "$@" ;;
        crash)   [ $# -eq 1 ] || die "crash needs a node"; crash "$@" ;;
        __login) login_main ;;
        __node)  node_main "$@" ;;
        help|-h|--help) usage ;;
        *)       die "no verb '$verb' (cluster.sh help)" ;;
    esac
}

main "$@"
