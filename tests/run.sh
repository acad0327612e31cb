#!/usr/bin/env bash
# Runs the tests in .venv of the repository: bash tests/run.sh [--aot | --aot=full]
# [--extras] [PYTEST ARGUMENTS]. With --aot also compiles kernels and training steps for
# TPUs that are not here, in .venv-tpu (500 MB; about two minutes, four at most);
# --aot=full whole models too, and for an H100 that is not here, in .venv-cuda12 (5 GB).
# With --extras runs only what needs other programs, tests/extras, in .venv-extras, which
# has PyTorch and more beside the packages of .venv (1 GB; where pip's own index is all
# that pip knows, 4 GB, with a CUDA that nothing here uses).
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=launch/environment.sh disable=SC1091
source "$ROOT/launch/environment.sh"

aot="" extras=""
# The last release that has TransfoXL, which wants sacremoses for its tokenizer.
EXTRAS=(torch==2.13.0 transformers==4.57.6 sacremoses lm-eval==0.4.13)
arguments=()
for argument in "$@"; do
    case $argument in
        --aot) aot=some ;;
        --aot=full) aot=full ;;
        --extras) extras=yes ;;
        --aot=*)
            say "error: $argument: give --aot or --aot=full"
            exit 2
            ;;
        *) arguments+=("$argument") ;;
    esac
done

# compile_for KIND MODULE SECONDS ARGUMENTS: runs python with the compiler of KIND, the
# extra that brings MODULE, in .venv-KIND. Where that cannot be installed, says so and is
# content.
compile_for() {
    local kind=$1 module=$2 limit=$3 venv="$ROOT/.venv-$1" stamp current
    stamp="$venv/installed-$kind"
    current=$({ printf '%s\n' "$ROOT"; cat "$ROOT/setup.py"; } | cksum)
    if [[ ! -f $stamp || $(<"$stamp") != "$current" ]]; then
        say "aot: installing the compiler [$kind] into $venv (minutes the first time)"
        make_venv "$python" "$venv" || return
        if ! "$venv/bin/python" -m pip install --quiet --editable "${ROOT}[$kind]" ||
            ! "$venv/bin/python" -c "import $module"; then
            say "aot: skipped: $module cannot be installed here"
            return
        fi
        printf '%s\n' "$current" >"$stamp"
    fi
    timeout --kill-after=10 "$limit" "$venv/bin/python" "${@:4}" || {
        local status=$?
        [[ $status -ne 124 ]] || say "aot: not done after $limit s"
        return "$status"
    }
}

# run_extras PYTEST ARGUMENTS: ordinary runs see neither these packages nor these tests.
# What cannot be had without a network is left out, and said.
run_extras() {
    local venv="$ROOT/.venv-extras" stamp current packages
    stamp="$venv/installed-extras"
    current=$({ printf '%s\n' "$ROOT" "${EXTRAS[@]}"; cat "$ROOT/setup.py"; } | cksum)
    if [[ ! -f $stamp || $(<"$stamp") != "$current" ]]; then
        say "extras: installing ${EXTRAS[*]} into $venv (minutes the first time)"
        make_venv "$python" "$venv" || return
        packages='import sysconfig; print(sysconfig.get_path("purelib"))'
        "$ROOT/.venv/bin/python" -c "$packages" \
            >"$("$venv/bin/python" -c "$packages")/ordinary.pth"
        if ! "$venv/bin/python" -m pip install --quiet "${EXTRAS[@]}"; then
            say "extras: skipped: ${EXTRAS[*]} cannot be installed here"
            return 0
        fi
        printf '%s\n' "$current" >"$stamp"
    fi
    bash "$ROOT/launch/gpu.sh" --prepare </dev/null ||
        say "extras: not all programs could be fetched; what needs them is skipped"
    "$venv/bin/python" -m pytest -n 0 -rs "${@:-tests/extras}"
}

python=$(find_python)
install "$python" test
cd "$ROOT"
if [[ -n $extras ]]; then
    run_extras ${arguments[@]+"${arguments[@]}"}
    exit
fi
# Two processes: compiling is what most of the time goes to, and XLA does that on one
# core. A file stays in one process, which its fixtures and compiled functions share; the
# order of files is that of tests/conftest.py.
status=0
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
    ${arguments[@]+"${arguments[@]}"} || status=$?
case $aot in
    some) compile_for tpu libtpu 240 tests/aot/compile_tpu.py || status=1 ;;
    full)
        compile_for tpu libtpu 1200 tests/aot/compile_tpu.py full || status=1
        compile_for cuda12 jax_cuda12_plugin 1200 tests/aot/compile_gpu.py || status=1
        ;;
esac
exit "$status"
