#!/usr/bin/env bash
# Runs the tests in .venv of the repository: bash tests/run.sh [--aot | --aot=full]
# [PYTEST ARGUMENTS]. With --aot also compiles kernels and training steps for TPUs that
# are not here, in .venv-tpu (500 MB; about two minutes); --aot=full whole models too.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=launch/environment.sh disable=SC1091
source "$ROOT/launch/environment.sh"

aot=""
arguments=()
for argument in "$@"; do
    case $argument in
        --aot) aot=some ;;
        --aot=full) aot=full ;;
        --aot=*)
            say "error: $argument: give --aot or --aot=full"
            exit 2
            ;;
        *) arguments+=("$argument") ;;
    esac
done

# compile_for_tpu PYTHON WHAT: where the compiler cannot be installed, says so and is
# content.
compile_for_tpu() {
    local python=$1 what=$2 venv="$ROOT/.venv-tpu" stamp current
    stamp="$venv/installed-tpu"
    current=$({ printf '%s\n' "$ROOT"; cat "$ROOT/setup.py"; } | cksum)
    if [[ ! -f $stamp || $(<"$stamp") != "$current" ]]; then
        say "aot: installing the TPU compiler into $venv (minutes the first time)"
        make_venv "$python" "$venv" || return
        if ! "$venv/bin/python" -m pip install --quiet --editable "${ROOT}[tpu]" ||
            ! "$venv/bin/python" -c 'import libtpu'; then
            say "aot: skipped: libtpu cannot be installed here"
            return
        fi
        printf '%s\n' "$current" >"$stamp"
    fi
    "$venv/bin/python" tests/aot/compile_tpu.py "$what"
}

python=$(find_python)
install "$python" test
cd "$ROOT"
# Two processes: compiling is what most of the time goes to, and XLA does that on one
# core. A file stays in one process, which its fixtures and compiled functions share.
status=0
.venv/bin/python -m pytest -n 2 --dist loadfile ${arguments[@]+"${arguments[@]}"} || status=$?
if [[ -n $aot ]]; then
    compile_for_tpu "$python" "$aot" || status=1
fi
exit "$status"
