#!/usr/bin/env bash
# Installs what building or testing farm needs, where it can (Debian or Ubuntu, as root or by sudo); elsewhere says
# what to install or load. Silent, and quick, when everything is there.
#
#   .ci/deps.sh build         Rust, a C compiler, MPI with its headers, libclang
#   .ci/deps.sh build test    also a C++ compiler, for the GPU's kernels on the CPU, and Slurm, munge, PMIx, Lmod and
#                             iproute2, for the end-to-end tests
#
# Exit 1 when something that the build needs is missing. The tests' programs are a wish: without them those tests
# skip themselves.
set -euo pipefail
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '%s\n' "$*" >&2; }
have() { command -v "$1" > /dev/null 2>&1; }

# ---------------------------------------------------------------- what is missing, as Debian packages

missing_for_build() {
    have cc || have gcc || have clang || echo gcc libc6-dev
    have mpicc || echo libopenmpi-dev
    have mpirun || echo openmpi-bin
    have_libclang || echo libclang-dev
}

# bindgen, which writes the MPI bindings, opens libclang at build time; these are the places where it looks.
have_libclang() {
    local folder
    for folder in "${LIBCLANG_PATH:-}" $(tr : " " <<< "${LD_LIBRARY_PATH:-}") /usr/lib/llvm-*/lib /usr/lib*/ /usr/lib/*-linux-gnu \
        /usr/local/lib* "$(llvm-config --libdir 2> /dev/null || true)"; do
        [ -z "$folder" ] || ! compgen -G "$folder/libclang*.so*" > /dev/null || return 0
    done
    return 1
}

missing_for_test() {
    have c++ || echo g++
    have slurmctld || echo slurmctld
    have slurmd || echo slurmd slurm-wlm-basic-plugins
    have srun || echo slurm-client
    have munged || echo munge
    have ip && have tc || echo iproute2
    compgen -G '/usr/lib*/*/libpmix.so*' > /dev/null || compgen -G '/usr/lib*/libpmix.so*' > /dev/null || echo libpmix2
    have_modules || echo lmod
}

# Either kind of modules will do; Debian's packages of the two exclude one another.
have_modules() { [ -n "${LMOD_CMD:-}${MODULESHOME:-}" ] || [ -e /usr/share/lmod ] || [ -e /usr/share/modules ]; }

# ---------------------------------------------------------------- installing on Debian and Ubuntu

can_install() { have apt-get && { [ "$(id -u)" = 0 ] || { have sudo && sudo -n true 2> /dev/null; }; }; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 -qq install -y \
        --no-install-recommends "$@" > /dev/null
}

# The package lists may be absent or old: they are fetched only when a first try fails.
install_packages() {
    say "installing: $*"
    hold_back_daemons
    apt_install "$@" 2> /dev/null || { as_root apt-get -o DPkg::Lock::Timeout=120 -qq update && apt_install "$@"; }
}

# Debian starts a daemon as it installs it. A test machine wants the programs only, so Debian is told no meanwhile.
hold_back_daemons() {
    local policy=/usr/sbin/policy-rc.d
    [ ! -e $policy ] || return 0
    trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' | as_root tee $policy > /dev/null
    as_root chmod 755 $policy
}

# ---------------------------------------------------------------- what to do elsewhere

advise() {
    say "farm $1 needs what is not here: ${*:2}"
    if have apt-get; then
        say "  sudo apt-get install --no-install-recommends ${*:2}"
    elif [ "$1" = build ]; then
        say "  Fedora, RHEL, Rocky:  dnf install gcc openmpi-devel clang-devel && module load mpi/openmpi-x86_64"
        say "  SUSE:                 zypper install gcc openmpi4-devel clang-devel && module load gnu-openmpi"
        say "  on a cluster:         module load openmpi llvm   (names differ: module avail; any MPI 3 with mpicc)"
        say "  libclang elsewhere:   export LIBCLANG_PATH=/folder/of/libclang.so"
    else
        say "  Fedora, RHEL, Rocky:  dnf install gcc-c++ slurm-slurmctld slurm-slurmd munge pmix Lmod iproute-tc"
        say "  SUSE:                 zypper install gcc-c++ slurm slurm-node munge pmix lua-lmod iproute2"
    fi
}

require_rust() {
    if ! have cargo; then
        say "farm build needs Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or later:"
        say "  https://rustup.rs, or on a cluster: module load rust"
        exit 1
    fi
}

main() {
    local want packages=()
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    for want in "$@"; do
        case $want in
            build) require_rust ;;
            test) ;;
            *) say "deps.sh takes build or test, not '$want'"; exit 2 ;;
        esac
        read -ra packages -d '' < <(missing_for_"$want") || true
        [ ${#packages[@]} -gt 0 ] || continue
        if ! can_install || ! install_packages "${packages[@]}"; then
            advise "$want" "${packages[@]}"
            [ "$want" = test ] || exit 1
            say "  (the tests that need them are skipped)"
        fi
    done
}

main "$@"
