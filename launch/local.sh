#!/usr/bin/env bash
# Sets up this machine, then trains, scores and samples one model, or runs one command of
# xlformer. See --help.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=launch/environment.sh disable=SC1091
source "$ROOT/launch/environment.sh"

COMMAND="" CONFIG=quickstart WORKDIR="" PROCESSES=1 MAX_RESTARTS=10 DRY=""
REST=() # for the command

usage() {
    cat <<'END'
usage: bash launch/local.sh [--help] [--dry-run] [--config=NAME] [--workdir=PATH]
                            [--processes=N [--max_restarts=K]] [TRAIN ARGUMENTS]
       bash launch/local.sh train|evaluate|generate [FLAGS] [ARGUMENTS OF THE COMMAND]

Needs Python 3.11 or newer and, the first time, a network to install packages from.
1. Makes .venv in the repository and installs xlformer for the accelerator found here.
2. Trains --config (quickstart) in --workdir (runs/CONFIG in the repository); a run that
   was interrupted goes on, a complete one is left as it is.
3. Scores the test split and prints a sample.
--config.train.steps=100 and the like, --init_from and --manual_dir go to training.
With a command as the first word: 1., then that command alone.
--processes=N runs training (or the command) in N processes, on CPU only; when one fails
all are started again, up to K (10) times.
--dry-run prints the commands; it installs and runs nothing.

Environment: PYTHON=/path/to/python, XLFORMER_EXTRA=cpu|cuda12|cuda13|tpu
Exit code: that of the first step that fails; 42: interrupted, and saved.
END
}

parse() {
    local flag="" argument
    ! is_command "${1:-}" || { COMMAND=$1 && shift; }
    no_other_word "${1:-}"
    for argument in "$@"; do
        [[ -z $flag || $argument != --* ]] || bad "${flag%=} needs a value"
        argument="$flag$argument" # '--config X' becomes '--config=X'
        flag=""
        case $argument in
            --help | -h) usage && exit ;;
            --dry-run) DRY=yes ;;
            --config | --workdir | --processes | --max_restarts) flag="$argument=" ;;
            --config=*) CONFIG=${argument#*=} ;;
            --workdir=*) WORKDIR=${argument#*=} ;;
            --processes=*) PROCESSES=${argument#*=} ;;
            --max_restarts=*) MAX_RESTARTS=${argument#*=} ;;
            --config.* | --init_from* | --manual_dir*) REST+=("$argument") ;;
            --*) # would be refused only after the installation
                [[ ${COMMAND:-train} != train ]] ||
                    bad "unknown argument $argument (see --help)"
                REST+=("$argument")
                ;;
            *) REST+=("$argument") ;; # the value of one of those
        esac
    done
    [[ -z $flag ]] || bad "${flag%=} needs a value"
    number processes "$PROCESSES" 1
    number max_restarts "$MAX_RESTARTS" 0
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
    parse "$@"
    local name
    name=$(basename "${CONFIG%%:*}" .py)
    [[ -n $WORKDIR ]] || WORKDIR="$ROOT/runs/$name"

    local python choice
    python=$(find_python)
    choice=$(choose_extra)
    say "device: $choice"
    if [[ $PROCESSES -gt 1 && ${choice%%:*} != cpu ]]; then
        bad "--processes=$PROCESSES: only on CPU; one process drives all the GPUs or" \
            "TPU chips of a machine"
    fi
    [[ -n $DRY ]] || install "$python" "${choice%%:*}"

    local xlformer=("$ROOT/.venv/bin/python" -m xlformer)
    local first=("${xlformer[@]}" "${COMMAND:-train}")
    [[ ${COMMAND:-train} != train ]] || first+=("--config=$CONFIG")
    first+=("--workdir=$WORKDIR")
    first+=(${REST[@]+"${REST[@]}"}) # bash before 4.4 calls an empty list unset
    local prefix=""
    if [[ $PROCESSES -gt 1 ]]; then
        # Virtual devices hang in a collective when XLA sizes its thread pools by the
        # real cores: eight on two cores, in 5 of 5 runs (jax 0.10.2).
        export NPROC=${NPROC:-16}
        prefix="NPROC=$NPROC "
        # Beside the run, not in it: it may lie in gs://, where nothing is appended to.
        local logs="$WORKDIR.hosts"
        [[ $WORKDIR != *://* ]] || logs="$ROOT/runs/$name.hosts"
        first=("${xlformer[0]}" "$ROOT/launch/supervise.py" "--processes=$PROCESSES"
            "--max_restarts=$MAX_RESTARTS" "--log_dir=$logs" -- "${first[@]}")
    fi
    local score=("${xlformer[@]}" evaluate "--workdir=$WORKDIR" --split=test)
    local sample=("${xlformer[@]}" generate "--workdir=$WORKDIR" --num_tokens=300)
    [[ $CONFIG != quickstart ]] || sample+=("--prompt=def ") # it has learnt Python
    if [[ -n $DRY ]]; then
        echo "install: ${choice%%:*}, into $ROOT/.venv"
        printf '%-8s %s\n' "${COMMAND:-train}:" "$prefix$(quoted "${first[@]}")"
        [[ -z $COMMAND ]] || return 0
        echo "score:   $(quoted "${score[@]}")"
        echo "sample:  $(quoted "${sample[@]}")"
        return
    fi

    local status=0
    run "${first[@]}" || status=$?
    if [[ $status -eq $INTERRUPTED ]]; then
        say "interrupted and saved; to go on: $(quoted "${first[@]}")"
    elif [[ $status -ne 0 ]]; then
        say "${COMMAND:-train} failed with exit code $status"
    fi
    [[ $status -eq 0 && -z $COMMAND ]] || return "$status"
    run "${score[@]}"
    run "${sample[@]}"

    say ""
    say "The run lies in $WORKDIR"
    say "resume:   $(quoted "${first[@]}")"
    say "evaluate: $(quoted "${score[@]}")"
    say "sample:   $(quoted "${sample[@]}")"
}

main "$@"
