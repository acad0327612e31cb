# shellcheck shell=bash
# Sourced by the other scripts: finds a Python, chooses the extra of setup.py for this
# machine's accelerator, keeps .venv in the repository up to date, knows the commands of
# xlformer and their exit codes. Defines functions, the exit codes and GLIBC_TUNABLES
# only. Wants ROOT, the repository, and `set -euo pipefail`.

# XLA takes its temporary arrays anew in each call, which on a CPU is faster in pages of
# 2 MiB (docs/performance.md). A libc other than glibc ignores it.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# BAD_INPUT, INTERRUPTED, HUNG: where the commands state them, no shell repeats them.
while IFS=' =' read -r name code _; do
    case $name in BAD_INPUT | INTERRUPTED | HUNG) printf -v "$name" %s "$code" ;; esac
done <"$ROOT/xlformer/errors.py"
unset name code

say() {
    printf '%s\n' "$*" >&2
}

# One line, and the end of the script: what only the caller can change.
bad() {
    say "error: $*"
    exit "$BAD_INPUT"
}

# number FLAG VALUE LEAST: refuses what is not a whole number of at least LEAST (0 or 1).
number() {
    [[ $2 =~ ^(0|[1-9][0-9]*)$ && $2 -ge $3 ]] || bad "--$1=$2: not a number from $3"
}

# Whether a word is a command of xlformer that several hosts run together. Every launcher
# takes one as its first word (train where there is none) and ends in
# `python -m xlformer COMMAND ARGUMENTS`.
is_command() {
    case ${1:-} in train | evaluate | generate) ;; *) return 1 ;; esac
}

# Refuses a first word that is neither a command nor a flag: training would refuse it too,
# but after the installation, or in a queue's turn.
no_other_word() {
    [[ -z $1 || $1 == -* ]] || bad "$1: none of train, evaluate, generate (see --help)"
}

# quoted WORD...: the words as one line that a shell reads back as the same words.
quoted() {
    local line
    line=$(printf '%q ' "$@")
    printf '%s' "${line% }"
}

# Prints a Python >= 3.11 that really runs (pyenv's shims exist for versions that do
# not). PYTHON=/path/to/python in the environment goes first.
find_python() {
    local candidate version found=""
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
        [[ -n $candidate ]] || continue
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' \
            2>/dev/null) || continue
        if [[ ${version%%.*} -eq 3 && ${version#*.} -ge 11 ]]; then
            printf '%s\n' "$candidate"
            return
        fi
        found+="${found:+, }$candidate is $version"
    done
    bad "xlformer needs Python 3.11 or newer (found: ${found:-none});" \
        "install one, or name it: PYTHON=/path/to/python3.11"
}

# Prints 'EXTRA: why', EXTRA one of cpu, cuda12, cuda13, tpu. Looks at files and asks
# nvidia-smi; no network. XLFORMER_EXTRA in the environment decides instead.
# DEVICE_FILES stands in for /dev in tests.
choose_extra() {
    local device_files=${DEVICE_FILES:-/dev} chips groups
    if [[ -n ${XLFORMER_EXTRA:-} ]]; then
        case $XLFORMER_EXTRA in
            cpu | cuda12 | cuda13 | tpu) echo "$XLFORMER_EXTRA: XLFORMER_EXTRA says so" ;;
            *) bad "XLFORMER_EXTRA=$XLFORMER_EXTRA: not cpu, cuda12, cuda13 or tpu" ;;
        esac
        return
    fi
    # /dev/accel0 is a TPU chip. /dev/accel/accel0, a directory deeper, is the kernel's
    # place for other makers; /dev/vfio/0 may be any device that a virtual machine was
    # lent, so a TPU machine's environment has to say the rest.
    chips=$(compgen -G "$device_files/accel[0-9]*" || true)
    groups=$(compgen -G "$device_files/vfio/[0-9]*" || true)
    if [[ -n $chips ]]; then
        echo "tpu: ${chips%%$'\n'*} exists"
    elif [[ -n $groups && -n ${TPU_NAME:-}${TPU_ACCELERATOR_TYPE:-}${TPU_WORKER_ID:-} ]]
    then
        echo "tpu: ${groups%%$'\n'*} exists and the environment names a TPU"
    elif ! command -v nvidia-smi >/dev/null; then
        echo "cpu: no TPU device files and no nvidia-smi"
    else
        choose_cuda
    fi
}

# The NVIDIA part of choose_extra. CUDA 13 wheels want driver 580 and compute capability
# 7.5 (Turing), CUDA 12 wheels driver 525. With several GPUs the oldest decides.
choose_cuda() {
    local report driver capability found oldest=""
    # Drivers too old for the field compute_cap are still asked for their version.
    report=$(nvidia-smi --query-gpu=driver_version,compute_cap \
        --format=csv,noheader 2>/dev/null) ||
        report=$(nvidia-smi --query-gpu=driver_version \
            --format=csv,noheader 2>/dev/null) || report=""
    if [[ ! $report =~ ^[0-9]+\. ]]; then
        echo "cpu: nvidia-smi is here but reports no GPU"
        return
    fi
    driver=${report%%.*}
    while IFS=', ' read -r _ capability; do
        [[ $capability =~ ^[0-9]+\.[0-9]$ ]] || continue
        capability=${capability/./} # 9.0 is 90: the shell compares whole numbers
        [[ -n $oldest && $oldest -le $capability ]] || oldest=$capability
    done <<<"$report"
    found="NVIDIA driver $driver"
    [[ -z $oldest ]] || found+=", compute capability ${oldest%?}.${oldest: -1}"
    if [[ $driver -lt 525 ]]; then
        echo "cpu: $found; CUDA 12 needs driver 525"
    elif [[ -n $oldest && $oldest -lt 52 ]]; then
        echo "cpu: $found; CUDA 12 needs capability 5.2"
    elif [[ $driver -ge 580 && -n $oldest && $oldest -ge 75 ]]; then
        echo "cuda13: $found"
    else
        echo "cuda12: $found; CUDA 13 needs driver 580 and capability 7.5"
    fi
}

# install PYTHON EXTRA: makes .venv and installs the package with that extra, unless the
# stamp of the last time is current.
install() {
    local python=$1 extra=$2 venv="$ROOT/.venv" stamp current
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        make_venv "$python" "$venv"
    fi
    # Where it lies belongs to the stamp: an editable install is a path.
    stamp="$venv/installed-$extra"
    current=$({ printf '%s\n' "$ROOT"; cat "$ROOT/setup.py"; } | cksum)
    if [[ -f $stamp && $(<"$stamp") == "$current" ]]; then
        say "environment: $venv is up to date for $extra"
        return
    fi
    say "environment: installing xlformer for $extra into $venv (minutes the first time)"
    "$venv/bin/python" -m pip install --quiet --editable "${ROOT}[$extra]"
    printf '%s\n' "$current" >"$stamp"
}

# make_venv PYTHON DIRECTORY: a new virtual environment with pip in it. What lies there
# without a working pip is a half-made one, or another tool's: only ours is cleared.
make_venv() {
    local python=$1 venv=$2 version
    if [[ -x $venv/bin/python ]] && "$venv/bin/python" -c '' 2>/dev/null &&
        "$venv/bin/python" -m ensurepip --upgrade >/dev/null 2>&1; then
        return
    fi
    if [[ -e $venv && ! -e $venv/xlformer ]]; then
        say "error: $venv has no working pip and was not made here; delete it first"
        return "$BAD_INPUT"
    fi
    say "environment: making $venv with $("$python" --version 2>&1)"
    mkdir -p "$venv"
    touch "$venv/xlformer"
    if ! "$python" -m venv "$venv" >&2; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        say "error: $python cannot make virtual environments;" \
            "on Debian and Ubuntu: sudo apt install python$version-venv"
        return "$BAD_INPUT"
    fi
}
