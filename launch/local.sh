#!/usr/bin/env bash
# Sets up this machine, then trains, scores and samples one model. See --help.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=launch/environment.sh disable=SC1091
source "$ROOT/launch/environment.sh"

INTERRUPTED=42 # training's exit code for: asked to stop, and saved

usage() {
    cat <<'END'
usage: bash launch/local.sh [--help] [--config=NAME] [--workdir=PATH] [TRAIN ARGUMENTS]

Needs Python 3.11 or newer and, the first time, a network to install packages from.
1. Makes .venv in the repository and installs xlformer for the accelerator found here.
2. Trains --config (quickstart) in --workdir (runs/CONFIG in the repository); a run that
   was interrupted goes on, a complete one is left as it is.
3. Scores the test split and prints a sample.
Any other argument goes to training: --config.train.steps=100, for example.

Environment: PYTHON=/path/to/python, XLFORMER_EXTRA=cpu|cuda12|cuda13|tpu
Exit code: that of the first step that fails; 42: interrupted, and saved.
END
}

# Runs a command and hands SIGINT and SIGTERM on to it, once each, so that training can
# save: bash alone would die on SIGTERM and leave it running. Its own process group
# (set -m) is why a Ctrl-C at the terminal does not reach it a second time.
run() {
    local child status again=yes
    set -m
    "$@" &
    child=$!
    set +m
    trap 'again=yes; kill -INT "$child" 2>/dev/null || true' INT
    trap 'again=yes; kill -TERM "$child" 2>/dev/null || true' TERM
    while [[ -n $again ]]; do # a trapped signal ends `wait`, not the child
        again=""
        status=0
        wait "$child" || status=$?
    done
    trap - INT TERM
    return "$status"
}

main() {
    local config=quickstart workdir="" flag="" argument rest=()
    for argument in "$@"; do
        argument="$flag$argument" # '--config X' becomes '--config=X'
        flag=""
        case $argument in
            --help | -h) usage && return ;;
            --config | --workdir) flag="$argument=" ;;
            --config=*) config=${argument#*=} ;;
            --workdir=*) workdir=${argument#*=} ;;
            *) rest+=("$argument") ;;
        esac
    done
    if [[ -n $flag ]]; then
        say "error: ${flag%=} needs a value"
        return 2
    fi
    local name
    name=$(basename "${config%%:*}" .py)
    [[ -n $workdir ]] || workdir="$ROOT/runs/$name"

    local python choice
    python=$(find_python)
    choice=$(choose_extra)
    say "device: $choice"
    install "$python" "${choice%%:*}"
    python="$ROOT/.venv/bin/python"

    local train=("$python" -m xlformer.train "--config=$config" "--workdir=$workdir")
    local evaluate=("$python" -m xlformer.evaluate "--workdir=$workdir" --split=test)
    local generate=("$python" -m xlformer.generate "--workdir=$workdir")
    train+=(${rest[@]+"${rest[@]}"}) # bash before 4.4 calls an empty list unset

    local status=0
    run "${train[@]}" || status=$?
    if [[ $status -eq $INTERRUPTED ]]; then
        say "interrupted and saved; to go on: $(printf '%q ' "${train[@]}")"
    elif [[ $status -ne 0 ]]; then
        say "training failed with exit code $status"
    fi
    [[ $status -eq 0 ]] || return "$status"
    run "${evaluate[@]}"
    run "${generate[@]}" "--prompt=def " --num_tokens=300

    say ""
    say "The run lies in $workdir"
    say "resume:   $(printf '%q ' "${train[@]}")"
    say "evaluate: $(printf '%q ' "${evaluate[@]}")"
    say "sample:   $(printf '%q ' "${generate[@]}" "--prompt=def " --num_tokens=300)"
}

main "$@"
