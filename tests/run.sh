#!/usr/bin/env bash
# Runs the tests in .venv of the repository: bash tests/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=launch/environment.sh disable=SC1091
source "$ROOT/launch/environment.sh"

python=$(find_python)
install "$python" test
cd "$ROOT"
# Two processes: compiling is what most of the time goes to, and XLA does that on one
# core. A file stays in one process, which its fixtures and compiled functions share.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
