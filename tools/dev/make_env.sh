#!/usr/bin/env bash
# Makes a virtual environment with exact versions, or completes one.
#
#   tools/dev/make_env.sh onedl .venv                    the maintained mm packages
#   tools/dev/make_env.sh openmmlab .venv-openmmlab      the upstream mm packages
#
# Every finished step leaves a stamp in <environment>/.stamps, so an interrupted run goes on where it
# was and a finished environment costs nothing. A stamp holds a key made of everything that
# decides what is installed; when that changes, the steps run again and pip installs the difference.
#
# Read from the environment:
#   PYTHON          interpreter to use (default: the first suitable one on PATH)
#   PIP_FIND_LINKS  folders with ready-made wheels; one of mmcv there saves compiling it
set -euo pipefail

readonly stack=$1 env=$2
readonly python=$env/bin/python
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# pip takes the constraints from here rather than from -c, so that constraints in a user's pip
# configuration are replaced and not added. The path is relative because pip splits it at spaces.
export PIP_CONSTRAINT=requirements/$stack.txt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0

# Measured: 6 GB in the environment, and what pip downloads and unpacks meanwhile.
readonly gigabytes_for_torch=10 gigabytes_for_the_rest=2

say() { printf 'make_env: %s\n' "$*"; }
die() {
    printf 'make_env: %s\n' "$*" >&2
    exit 1
}

case $stack in
    onedl) readonly mmcv=onedl-mmcv ;;
    openmmlab) readonly mmcv=mmcv ;;
    *) die "unknown set of packages '$stack': give onedl or openmmlab" ;;
esac

key=$({ cat "$PIP_CONSTRAINT" setup.cfg tools/dev/make_env.sh && pwd; } | sha256sum | cut -c 1-16)
readonly key

is_done() { [ "$(cat "$env/.stamps/$1" 2>/dev/null)" = "$key" ]; }

# step NAME TITLE FUNCTION: runs the function unless NAME's stamp says it is done.
step() {
    is_done "$1" && return
    say "$2"
    "$3" || die "'$2' failed (see above); the same command goes on from here"
    mkdir -p "$env/.stamps"
    printf '%s\n' "$key" >"$env/.stamps/$1"
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
is_supported() { [[ $1 =~ ^3\.1[0-2]$ ]]; }

# Prints the interpreter to make the environment with.
find_python() {
    local candidates=(python3.11 python3.12 python3.10 python3) candidate version seen=
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        version=$(version_of "$candidate") || continue
        if is_supported "$version"; then
            printf '%s\n' "$candidate"
            return
        fi
        seen=" ($candidate is $version)"
    done
    die "Python 3.10, 3.11 or 3.12 is needed$seen: apt-get install python3.12-venv python3.12-dev (or the" \
        "same of 3.11 or 3.10), or name one from elsewhere: make env PYTHON=/path/to/python3.12"
}

# Says in one line everything that is missing, before anything is downloaded.
check_system() {
    local version=$2 missing=() packages=()
    if ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
        missing+=("Python's venv module") packages+=("python$version-venv")
    fi
    if ! "$1" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null; then
        missing+=("Python's headers (Python.h)") packages+=("python$version-dev")
    fi
    if ! command -v "${CXX:-g++}" >/dev/null; then
        missing+=("a C++ compiler (${CXX:-g++})") packages+=(g++)
    fi
    if [ ${#missing[@]} -gt 0 ]; then
        local list
        list=$(printf ', %s' "${missing[@]}")
        die "missing ${list:2}: apt-get install ${packages[*]}"
    fi
}

check_disk() {
    local need=$gigabytes_for_torch free
    if [ -e "$env/.stamps/torch" ]; then need=$gigabytes_for_the_rest; fi
    read -r _ _ _ free _ < <(df -Pk . | tail -n 1)
    if [ "$free" -lt $((need * 1024 * 1024)) ]; then
        die "$env needs about $need GB of free disk space, $PWD has $((free / 1024 / 1024)) GB: free some," \
            "or clone the repository onto a larger disk"
    fi
}

# The environment's pip. What it unpacks goes beside the environment: /tmp is often small.
pip() {
    mkdir -p "$env/tmp"
    TMPDIR=$(realpath "$env/tmp") "$python" -m pip "$@"
}

make_venv() {
    [ "$base_python" = "$python" ] || "$base_python" -m venv --clear "$env" || return
    pip install pip
}

# mmcv and mmengine are built by, and at run time use, what is installed here.
install_torch() { pip install torch torchvision setuptools wheel ninja psutil; }

# mmcv's build takes a GPU that PyTorch sees for granted, and fails without the matching compiler.
hide_gpu_without_compiler() {
    nvidia-smi -L 2>/dev/null | grep -q GPU || return 0
    local wanted toolkit found
    wanted=$("$python" -c 'import torch; print(torch.version.cuda)')
    toolkit=$("$python" -c 'from torch.utils.cpp_extension import CUDA_HOME; print(CUDA_HOME or "")')
    found=$("$toolkit/bin/nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\),.*/\1/p') || true
    [ "${found%%.*}" = "${wanted%%.*}" ] && return 0
    say "there is a GPU but no CUDA $wanted compiler (nvcc): mmcv gets no GPU operators and detectors run on" \
        "the CPU; to change that, install the CUDA $wanted toolkit, then rm -r $env and run this again"
    export CUDA_VISIBLE_DEVICES=
}

# No cache: it would hand out a wheel that was compiled against another PyTorch or without a GPU.
# mmcv would run four compilers even on two cores; each takes up to 1 GB of memory.
install_mmcv() {
    hide_gpu_without_compiler
    CFLAGS="${CFLAGS:-} -g0" MAX_JOBS="${MAX_JOBS:-$(nproc)}" \
        pip install --no-build-isolation --no-cache-dir "$@" "$mmcv" || return
    # mmcv brings opencv-python, which needs a desktop's libraries (libGL); the headless build has the
    # same modules without its windows, and goes over them.
    pip install --force-reinstall --no-deps opencv-python-headless || return
    "$python" -W ignore -c 'import mmcv.ops' && return
    [ $# -eq 0 ] && install_mmcv --force-reinstall --no-deps
}

install_project() {
    pip install --no-build-isolation --editable ".[$stack,dev]" && rm -rf "$env/tmp"
}

if is_done project && [ -x "$python" ]; then exit; fi

# An environment that was made by hand is completed; one whose making was cut short, or whose
# interpreter has gone, is made anew.
if "$python" -m pip --version >/dev/null 2>&1; then
    base_python=$python
    version=$(version_of "$python")
    is_supported "$version" ||
        die "$env holds Python $version, and 3.10, 3.11 or 3.12 is needed: rm -r $env and run this again"
else
    rm -rf "$env/.stamps"
    base_python=$(find_python)
    version=$(version_of "$base_python")
fi
check_system "$base_python" "$version"
check_disk

say "making $env with Python $version (about 6 GB)"
step venv "1 of 4: virtual environment" make_venv
step torch "2 of 4: PyTorch (downloads about 3 GB)" install_torch
step mmcv "3 of 4: mmcv (compiles for 5 to 10 minutes unless a wheel is found)" install_mmcv
step project "4 of 4: the other packages and this one" install_project
say "$env is ready"
