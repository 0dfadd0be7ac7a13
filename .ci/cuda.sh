#!/usr/bin/env bash
# Runs a command with a CUDA compiler at hand, for building farm with its features cuda and nccl:
#
#   .ci/cuda.sh cargo build --release --locked --features cuda,nccl       (make cuda)
#
# The compiler is, in this order: NVCC or CUDA_HOME where they are set, the nvcc on the PATH (a cluster's CUDA module),
# else wheels from PyPI, unpacked below target/ (CUDA_ROOT): neither a GPU nor a driver is needed.
#
#   CUDA=13   (default) nvcc 13: cards from compute capability 7.5 on, drivers from 580 on. Built for 80,90.
#   CUDA=12   NVRTC 12.9, since the wheels of CUDA 12 hold no nvcc: Volta (V100) too, drivers from 525 on. For 70,80,90.
#
# CUDA_COMPUTE_CAP=70,80,90 says for which cards; a list with one below 75 takes CUDA 12 by itself. Of what CUDA brings at
# run time (libcuda, cuBLAS, NCCL, NVML) nothing is needed here: farm looks for it when it starts.
set -euo pipefail

say() { printf '%s\n' "$*" >&2; }

# The wheels, pinned: what they compile was looked at.
WHEELS_13=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85)
WHEELS_12=(nvidia-cuda-nvrtc-cu12==12.9.86 nvidia-cuda-runtime-cu12==12.9.79 nvidia-cuda-nvcc-cu12==12.9.86
    nvidia-cuda-cccl-cu12==12.9.27 nvidia-cuda-nvcc==13.0.88)

# unpack FOLDER WHEEL...: each once.
unpack() {
    local folder=$1
    shift
    if [ "$(cat "$folder/wheels" 2> /dev/null)" = "$*" ]; then return 0; fi
    if ! python3 -m pip --version > /dev/null 2>&1; then
        say "farm with CUDA needs nvcc: module load cuda (or set CUDA_HOME), or python3 with pip, to get one from PyPI"
        exit 1
    fi
    say "getting a CUDA compiler into $folder: $*"
    rm -rf "$folder"
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --target "$folder" "$@"
    # Wheels keep no permissions, and nvcc looks for lib64.
    find "$folder" \( -path '*/bin/*' -o -path '*/nvvm/bin/*' \) -type f -exec chmod +x {} +
    [ ! -d "$folder/nvidia/cu13/lib" ] || ln -sfn lib "$folder/nvidia/cu13/lib64"
    echo "$*" > "$folder/wheels"
}

# Whether CUDA_COMPUTE_CAP lists a card that CUDA 13 has dropped.
wants_old_cards() {
    local capability
    for capability in ${CUDA_COMPUTE_CAP//[,;]/ }; do
        [ "${capability//[^0-9]/}" -ge 75 ] || return 0
    done
    return 1
}

main() {
    local here root
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    root=${CUDA_ROOT:-${CARGO_TARGET_DIR:-$here/../target}}
    export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-}
    if [ -n "${NVCC:-}" ] || [ -x "${CUDA_HOME:-}/bin/nvcc" ] || command -v nvcc > /dev/null; then
        :
    elif [ "${CUDA:-13}" = 12 ] || wants_old_cards; then
        mkdir -p "$root"
        root=$(cd "$root" && pwd)
        unpack "$root/cuda12" "${WHEELS_12[@]}"
        export CUDA12_ROOT=$root/cuda12 NVCC=$here/nvrtc.py
    else
        mkdir -p "$root"
        root=$(cd "$root" && pwd)
        unpack "$root/cuda13" "${WHEELS_13[@]}"
        export CUDA_HOME=$root/cuda13/nvidia/cu13
    fi
    "$@"
}

main "$@"
