#!/usr/bin/env bash
# What `make demo` shows: farm answers the demo prompts on two ranks, with the small model that comes with it.
#
#   .ci/demo.sh target/release/farm [RANKS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
farm=$1 ranks=${2:-2} shown=5
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
# Open MPI refuses root and more ranks than cores unless told; both are normal for a demo, in a container say.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1

# Prints prompt and text of the first records. Plain awk: Python or jq may be absent.
show_answers() {
    awk -v shown="$shown" '
        # the value of a JSON string field, unescaped as far as a terminal needs it
        function field(name,    value) {
            if (!match($0, "\"" name "\":\"([^\"\\\\]|\\\\.)*\"")) return ""
            value = substr($0, RSTART + length(name) + 4, RLENGTH - length(name) - 5)
            gsub(/\\n/, "\n    ", value); gsub(/\\t/, "    ", value); gsub(/\\"/, "\"", value); gsub(/\\\\/, "\\", value)
            return value
        }
        NR <= shown { printf "\n> %s\n    %s\n", field("prompt"), field("text") }
        END { printf "\n%d answers", NR; if (NR > shown) printf ", the first %d shown", shown; print "" }' "$1"
}

command=(mpirun -n "$ranks" --bind-to none "$farm" --prompts-file prompts/demo.jsonl --model models/tiny
    --output "$out/out.jsonl" --stats)
echo "\$ ${command[*]}"
"${command[@]}"
show_answers "$out/out.jsonl"
