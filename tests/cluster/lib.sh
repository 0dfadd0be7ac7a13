# shellcheck shell=bash disable=SC2034 # its variables are for those who source it
# What selftest.sh and e2e.sh share: a small test runner, and the commands that reach the cluster. Sourced.
#
# A test is a function test_NAME. It passes when it returns 0, fails by `fail WHY` or by any command that fails,
# and is left out by `skip WHY`. Each prints one line: `ok NAME`, `FAIL NAME: why`, `skip NAME: why`.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPOSITORY=$(cd "$HERE/../.." && pwd)
COMMAND_SECONDS_MAX=${COMMAND_SECONDS_MAX:-60}
passed=0 failed=0 skipped=0

cluster() { "$HERE/cluster.sh" "$@"; }

# A job that cannot start would wait for ever, so every command on the cluster has a time limit.
login() { timeout --kill-after=5 "$COMMAND_SECONDS_MAX" "$HERE/cluster.sh" exec "$@"; }
node()  { timeout --kill-after=5 "$COMMAND_SECONDS_MAX" "$HERE/cluster.sh" nodesh "$@"; }

fail() { echo "$*" > "$WHY"; exit 1; }
skip() { echo "$*" > "$WHY"; exit 77; }

# A figure that is shown even where the test passes.
say() { echo "  $*" >&3; }

# expect WHAT WANTED FOUND
expect() { [ "$2" = "$3" ] || fail "$1: expected '$2', found '$3'"; }

# expect_match WHAT EXTENDED_REGEX FILE
expect_match() { grep -qE -- "$2" "$3" || fail "$1: no '$2' in: $(tail -n 3 "$3" | tr '\n' ' ')"; }

# eventually SECONDS CMD…: until CMD succeeds
eventually() {
    local until=$((SECONDS + $1)); shift
    until "$@"; do
        [ $SECONDS -lt $until ] || return 1
        sleep 0.1
    done
}

run_test() {
    local name=$1 status started=$SECONDS log
    log=$(mktemp)
    WHY=$(mktemp)
    set +e
    (set -e; "test_$name") 3>&1 > "$log" 2>&1
    status=$?
    set -e
    report "$name" "$status" "$log" "$((SECONDS - started))"
    rm -f "$log" "$WHY"
}

report() {
    local name=$1 status=$2 log=$3 seconds=$4
    case $status in
        0)  passed=$((passed + 1)); echo "ok $name ($seconds s)" ;;
        77) skipped=$((skipped + 1)); echo "skip $name: $(cat "$WHY")" ;;
        *)  failed=$((failed + 1))
            [ -s "$WHY" ] || echo "exit $status after: $(tail -n 1 "$log")" > "$WHY"
            echo "FAIL $name: $(head -n 1 "$WHY")"
            tail -n "${LOG_LINES:-30}" "$log" | sed 's/^/    | /' ;;
    esac
}

# run_tests NAME…, or those named in $ONLY (comma-separated)
run_tests() {
    local name
    for name in "$@"; do
        case ",${ONLY:-$name}," in *",$name,"*) run_test "$name" ;; esac
    done
}

# Prints the closing line and leaves: 0 all passed, 1 some failed, 77 nothing could be run.
finish() {
    echo "$passed passed, $failed failed, $skipped skipped"
    [ "$failed" = 0 ] || exit 1
    [ "$passed" != 0 ] || exit 77
    exit 0
}

# The tests' own cluster, apart from one a developer has up. One run at a time; a second waits for the first.
# Where no cluster can be had, the whole run is skipped.
own_cluster() {
    export FARM_CLUSTER_DIR=$1
    local nodes=$2 status=0 reason
    exec 8> "$FARM_CLUSTER_DIR.tests.lock"
    flock -w 600 8 || { echo "another run holds $FARM_CLUSTER_DIR"; exit 1; }
    reason=$(cluster up "$nodes" 2>&1 8>&-) || status=$?
    case $status in
        0)  trap 'cluster down; rm -f "$FARM_CLUSTER_DIR.tests.lock"' EXIT
            trap 'exit 130' INT TERM HUP
            SCRATCH=$FARM_CLUSTER_DIR/scratch ;;
        77) echo "skip all: ${reason#cluster: skipped: }"; finish ;;
        *)  echo "$reason"; exit 1 ;;
    esac
}
