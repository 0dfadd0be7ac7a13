# shellcheck shell=bash disable=SC2034 # its variables are for those who source it
# What e2e.sh and kills.sh share: farm, installed on the cluster, its inputs, its jobs, its results. Sourced, after lib.sh.
#
# FARM_BIN: the binary (default: the newer of target/{release,debug}/farm); FARM_MODEL: a model folder (models/tiny).

newest_binary() { ls -t "$REPOSITORY"/target/{release,debug}/farm 2> /dev/null | head -n 1; }
BIN=$(readlink -f "${FARM_BIN:-$(newest_binary)}") || BIN=
SOURCE_MODEL=$(readlink -f "${FARM_MODEL:-$REPOSITORY/models/tiny}")
# farm reads FARM_… as its flags; those of the caller are not for the runs below.
for variable in "${!FARM_@}"; do
    case $variable in FARM_CLUSTER_*) ;; *) unset "$variable" ;; esac
done

require_farm() {
    [ -z "$BIN" ] || [ ! -x "$BIN" ] || return 0
    echo "skip all: no farm binary (make build, or set FARM_BIN)"
    finish
}

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

job_state() { login squeue -h -j "$1" -t all -o %T | head -n 1; }
job_is() { [ "$(job_state "$1")" = "$2" ]; }

# finished_with_requeues JOB: whether it has completed. A job that queued itself again, and would wait for two minutes,
# is started at once.
finished_with_requeues() {
    case $(login squeue -h -j "$1" -t all -o %T:%r) in
        COMPLETED:*) return 0 ;;
        PENDING:BeginTime) cluster hurry "$1" || fail "job $1 does not come back" ;;
    esac
    return 1
}
