#!/usr/bin/env bash
# One host of a Cloud TPU slice. tpu_vm.sh calls it on all of them at once, over ssh:
#   worker.sh install             makes .venv, with what a TPU and gs:// need
#   worker.sh start ATTEMPT COMMAND ...   runs that command of xlformer; the last line
#                                 that it prints says how that ended
#   worker.sh stop TERM           asks the command to save and end
#   worker.sh stop KILL           gives it 3 seconds to end by itself, then kills it
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=launch/environment.sh disable=SC1091
source "$ROOT/launch/environment.sh"

STATE="$HOME/.xlformer" # outside the checkout, which every copy replaces

install_host() {
    local python
    if ! python=$(find_python 2>/dev/null); then
        # The Ubuntu 22.04 images come with Python 3.10. A fresh host is often still
        # updating itself, hence the patience with the lock of dpkg.
        sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
        sudo apt-get -qq -y -o DPkg::Lock::Timeout=300 install \
            python3.11 python3.11-venv
        python=$(find_python)
    fi
    install "$python" tpu,gcs
}

# running PID: is that xlformer? (The id may belong to another program by now.)
running() {
    [[ -n $1 && -r /proc/$1/cmdline ]] &&
        tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null | grep -q -e '-m xlformer'
}

stop() {
    local signal=$1 pid="" wait
    [[ ! -f $STATE/pid ]] || pid=$(<"$STATE/pid")
    if ! running "$pid"; then
        return
    elif [[ $signal == TERM ]]; then
        kill -TERM "$pid"
        return
    fi
    for wait in {1..30}; do
        running "$pid" || return 0
        [[ $wait -lt 30 ]] || say "host $(hostname): killing $pid, which does not end"
        sleep 0.1
    done
    kill -KILL "$pid" || true
    for wait in {1..300}; do
        running "$pid" || break
        sleep 0.1
    done
    rm -f /tmp/libtpu_lockfile # what a killed process leaves; the next one refuses it
}

start() {
    local attempt=$1 child status=0
    shift
    mkdir -p "$STATE"
    if mkdir "$STATE/attempt-$attempt" 2>/dev/null; then
        stop KILL # what an earlier launcher may have left
        "$ROOT/.venv/bin/python" -m xlformer "$@" &
        child=$!
        echo "$child" >"$STATE/pid"
        wait "$child" || status=$?
        rm -f "$STATE/pid"
    else
        # gcloud lost the connection and repeats the command, but one host alone cannot
        # join the others again: this attempt is over for all.
        status=255
    fi
    echo "xlformer-host $(hostname) ended with $status"
    return "$status"
}

case ${1:-} in
    install) install_host ;;
    start | stop) "$@" ;;
    *) bad "worker.sh ${1:-}: not install, start or stop" ;;
esac
