#!/usr/bin/env bash
# Trains, evaluates or generates on a Cloud TPU slice of any number of hosts. See --help
# and launch/README.md.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=launch/environment.sh disable=SC1091
source "$ROOT/launch/environment.sh"

ACTION=run COMMAND=train NAME="" ZONE="" PROJECT="" ACCELERATOR="" RUNTIME=""
WORKDIR="" CONFIG=""
SPOT="" EXISTING="" KEEP="" DRY="" MAX_RESTARTS=10 WAIT_MINUTES=1440
CREATE_FLAGS=() ARGUMENTS=()
POLL_SECONDS=${POLL_SECONDS:-30}

DRY_STATE=absent # what --dry-run pretends
LEFT=""          # a slice may be there at the end
STALE=yes        # the hosts do not have this code yet
TOLD=0 RUNNING="" AGAIN=""

usage() {
    cat <<'END'
usage: bash launch/tpu_vm.sh [train|evaluate|generate] --name=NAME --zone=ZONE
           --accelerator=v5litepod-16 --workdir=gs://BUCKET/DIR --config=NAME
           [FLAGS] [ARGUMENTS OF THE COMMAND]
       bash launch/tpu_vm.sh create|copy|stop|delete --name=NAME --zone=ZONE [FLAGS]

Makes the slice, copies this repository to every host, runs the command (train) on all of
them, starts all again when one fails, makes the slice again when it was preempted, and
deletes it at the end. create, copy, delete: one of these steps alone; stop: asks the
command to save and end. --config=NAME is for train only.

--spot              a slice that may be taken back at any time, at a lower price
--existing          uses the TPU VM NAME that is there; never creates or deletes
--keep              does not delete at the end
--runtime=VERSION   software of the hosts (default: by the accelerator)
--project=PROJECT   (default: gcloud's)
--create_flag=FLAG  one more flag of `gcloud ... queued-resources create`, repeatable
--max_restarts=K    (10)   --wait_minutes=M for a slice (1440)
--dry-run           prints the commands and runs none
Exit code: the command's. 42: stopped by a signal, and saved.
END
}

parse() {
    local argument
    case ${1:-} in
        create | copy | stop | delete) ACTION=$1 && shift ;;
        *) ! is_command "${1:-}" || { COMMAND=$1 && shift; } ;;
    esac
    for argument in "$@"; do
        case $argument in
            --help | -h) usage && exit ;;
            --spot) SPOT=yes ;;
            --existing) EXISTING=yes ;;
            --keep) KEEP=yes ;;
            --dry-run) DRY=yes ;;
            --name=*) NAME=${argument#*=} ;;
            --zone=*) ZONE=${argument#*=} ;;
            --project=*) PROJECT=${argument#*=} ;;
            --accelerator=*) ACCELERATOR=${argument#*=} ;;
            --runtime=*) RUNTIME=${argument#*=} ;;
            --create_flag=*) CREATE_FLAGS+=("${argument#*=}") ;;
            --max_restarts=*) MAX_RESTARTS=${argument#*=} ;;
            --wait_minutes=*) WAIT_MINUTES=${argument#*=} ;;
            --workdir=*) WORKDIR=${argument#*=} && ARGUMENTS+=("$argument") ;;
            --config=*) CONFIG=${argument#*=} && ARGUMENTS+=("$argument") ;;
            --config.*=* | --manual_dir=* | --init_from=*) ARGUMENTS+=("$argument") ;;
            --*=*) # train's are all above: a typo must not cost a slice
                [[ $COMMAND != train ]] || bad "$argument: unknown (see --help)"
                ARGUMENTS+=("$argument")
                ;;
            *) bad "$argument: unknown, or without its =VALUE (see --help)" ;;
        esac
    done
}

# Everything that can be wrong is said before a slice exists and costs money.
check() {
    [[ -n $NAME ]] || bad "--name=NAME is missing"
    [[ -n $ZONE ]] || bad "--zone=ZONE is missing"
    number max_restarts "$MAX_RESTARTS" 0
    number wait_minutes "$WAIT_MINUTES" 0
    if [[ $ACTION == run || $ACTION == create ]] && [[ -z $EXISTING ]]; then
        [[ -n $ACCELERATOR ]] || bad "--accelerator=TYPE is missing (v5litepod-16, ...)"
        [[ -n $RUNTIME ]] || case $ACCELERATOR in
            v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
            v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
            v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
            v2-* | v3-* | v4-*) RUNTIME=tpu-ubuntu2204-base ;;
            *) bad "--runtime=VERSION is missing: no default for $ACCELERATOR" ;;
        esac
    fi
    [[ $ACTION == run ]] || return 0
    [[ -n $CONFIG || $COMMAND != train ]] || bad "--config=NAME is missing"
    [[ -n $WORKDIR ]] || bad "--workdir=gs://BUCKET/DIR is missing"
    [[ $WORKDIR != gs://* ]] || return 0
    [[ -n $ACCELERATOR || -n $DRY ]] || ACCELERATOR=$(tpu tpu-vm describe "$NAME" \
        "--format=value(acceleratorType)")
    # Up to 8 (cores or chips) are one host, in every generation.
    if [[ ! ${ACCELERATOR##*-} =~ ^[1-8]$ ]]; then
        bad "--workdir=$WORKDIR: the hosts of ${ACCELERATOR:-$NAME} need one directory" \
            "that all of them see: gs://BUCKET/DIR"
    elif [[ -z $KEEP$EXISTING ]]; then
        bad "--workdir=$WORKDIR lies on the slice, which is deleted at the end:" \
            "gs://BUCKET/DIR, or --keep"
    fi
}

# Runs a command, or prints it. File 3 is the real output, also inside $(...).
step() {
    if [[ -n $DRY ]]; then
        echo "+ $(quoted "$@")" >&3
    else
        "$@"
    fi
}

tpu() {
    step gcloud compute tpus "$@" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

# on_hosts COMMAND: in the home directory of every host at once.
on_hosts() {
    # A host that was taken away must not keep ssh waiting for ever; and a job in the
    # background that reads the terminal would be stopped.
    tpu tpu-vm ssh "$NAME" --worker=all "--ssh-flag=-o ConnectTimeout=30" \
        "--ssh-flag=-o ServerAliveInterval=30" "--command=$1" </dev/null
}

worker() {
    quoted bash xlformer/launch/worker.sh "$@"
}

# Prints what the slice is: absent, waiting, ready, or lost (preempted, failed).
slice() {
    local found describe=(queued-resources describe "$NAME"
        "--format=value(state.state)")
    if [[ -n $DRY ]]; then
        echo "$DRY_STATE"
        return
    fi
    [[ -z $EXISTING ]] || describe=(tpu-vm describe "$NAME" "--format=value(state)")
    if ! found=$(tpu "${describe[@]}" 2>&1); then
        if [[ $found != *NOT_FOUND* ]]; then
            say "error: ${found##*$'\n'}"
            return 1
        fi
        found=absent
    fi
    case ${found##*$'\n'} in
        ACTIVE | READY) echo ready ;;
        absent) echo absent ;;
        FAILED | SUSPEND* | PREEMPTED | TERMINATED | DELETING | STOP*) echo lost ;;
        *) echo waiting ;;
    esac
}

bring_up() {
    local state deadline=$((SECONDS + WAIT_MINUTES * 60))
    state=$(slice) || return 1
    LEFT=yes
    if [[ -n $EXISTING ]]; then
        [[ $state == ready ]] || say "error: --existing: $NAME is $state, not ready"
        [[ $state == ready ]]
        return
    fi
    if [[ $state == lost ]]; then
        say "the slice $NAME was preempted or has failed; making it again"
        remove || return 1
        state=absent
    fi
    if [[ $state == absent ]]; then
        STALE=yes
        tpu queued-resources create "$NAME" "--node-id=$NAME" \
            "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" \
            ${SPOT:+--spot} ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"} || return 1
        DRY_STATE=ready
        say "waiting for the slice $NAME, up to $WAIT_MINUTES minutes"
        state=$(slice) || return 1
    fi
    while [[ $state == waiting && $TOLD -eq 0 && $SECONDS -lt $deadline ]]; do
        pause
        state=$(slice) || return 1
    done
    [[ $state != ready ]] || return 0
    say "error: the slice $NAME is $state (--wait_minutes=$WAIT_MINUTES)"
    return 1
}

pause() {
    sleep "$POLL_SECONDS" & # `wait`, unlike a command, is ended by a signal
    wait "$!" || true
}

remove() {
    local output
    # --force: with its nodes. There is nothing to delete where creating it failed.
    output=$(tpu queued-resources delete "$NAME" --force --quiet 2>&1) ||
        [[ $output == *NOT_FOUND* ]] || { say "$output" && return 1; }
}

copy() {
    local archive="$TEMPORARY/xlformer.tar.gz" name exclude=()
    [[ -n $STALE ]] || return 0
    for name in ./.git "./.venv*" ./runs ./build ./peers "*.egg-info" __pycache__ ".*_cache"; do
        exclude+=("--exclude=$name")
    done
    say "copying the repository to every host"
    step tar -czf "$archive" "${exclude[@]}" -C "$ROOT" . || return 1
    tpu tpu-vm scp "$archive" "$NAME:xlformer.tar.gz" --worker=all || return 1
    # Old files go, so that a deleted module is deleted there too; packages stay.
    on_hosts "mkdir -p xlformer && find xlformer -mindepth 1 -maxdepth 1 \
! -name .venv -exec rm -rf {} + && tar -xzf xlformer.tar.gz -C xlformer && \
$(worker install)" || return 1
    STALE=""
}

# Prints what the hosts print, notes how each ended, and at the first failure makes the
# others end: they would hang in a collective until their heartbeat notices.
follow() {
    local line killing="" pattern="xlformer-host ([^ ]+) ended with ([0-9]+)"
    while IFS= read -r line; do
        printf '%s\n' "$line"
        [[ $line =~ $pattern ]] || continue
        echo "${BASH_REMATCH[2]}" >>"$TEMPORARY/codes"
        case ${BASH_REMATCH[2]} in
            0 | "$INTERRUPTED") ;;
            *)
                say "host ${BASH_REMATCH[1]} failed with exit code ${BASH_REMATCH[2]}"
                [[ -n $killing ]] || on_hosts "$(worker stop KILL)" &>/dev/null &
                killing=yes
                ;;
        esac
    done
    wait
}

# run_once NUMBER: runs the command on all hosts. The status of the whole: BAD_INPUT if a
# host has that, else that of a failed host, else INTERRUPTED if a host has that, else 0.
run_once() {
    local status code job attempt
    attempt=$(date +%s)-$$-$1 # never used before on these hosts
    : >"$TEMPORARY/codes"
    set -m # its own process group: a Ctrl-C at the terminal reaches only this script
    (
        set +e
        on_hosts "$(worker start "$attempt" "$COMMAND" "${ARGUMENTS[@]}")" 2>&1 | follow
        exit "${PIPESTATUS[0]}"
    ) &
    job=$!
    set +m
    RUNNING=yes AGAIN=yes
    while [[ -n $AGAIN ]]; do # a trapped signal ends `wait`, not the job
        AGAIN=""
        status=0
        wait "$job" || status=$?
    done
    RUNNING=""
    code=$(grep -vxm1 -e 0 -e "$INTERRUPTED" "$TEMPORARY/codes" || true)
    if grep -qx "$BAD_INPUT" "$TEMPORARY/codes"; then
        return "$BAD_INPUT"
    elif [[ -n $code ]]; then
        return "$code"
    elif grep -qx "$INTERRUPTED" "$TEMPORARY/codes"; then
        return "$INTERRUPTED"
    fi
    [[ $status -eq 0 ]] || return 255 # a connection was lost, and no host says why
}

on_signal() {
    TOLD=$((TOLD + 1)) AGAIN=yes
    [[ -n $RUNNING ]] || return 0
    if [[ $TOLD -eq 1 ]]; then
        say "$1: asking every host to save and end; once more kills"
        on_hosts "$(worker stop TERM)" &>/dev/null || true
    else
        on_hosts "$(worker stop KILL)" &>/dev/null || true
    fi
}

run() {
    local restarts=0 status
    while :; do
        status=1
        if bring_up && copy && [[ $TOLD -eq 0 ]]; then
            status=0
            run_once "$restarts" || status=$?
        elif [[ $TOLD -gt 0 ]]; then
            return "$INTERRUPTED" # between two attempts there is nothing to lose
        elif [[ $restarts -eq 0 ]]; then
            return 1 # nothing ever ran: rather a wrong flag than bad luck
        fi
        case $status in 0 | "$BAD_INPUT") return "$status" ;; esac
        if [[ $TOLD -gt 0 ]]; then
            return "$status"
        elif [[ $restarts -ge $MAX_RESTARTS ]]; then
            say "giving up after $MAX_RESTARTS restarts"
            return "$status"
        fi
        restarts=$((restarts + 1))
        say "exit code $status; restart $restarts of $MAX_RESTARTS"
        pause
    done
}

finish() {
    local status=$?
    trap '' INT TERM
    rm -rf "$TEMPORARY"
    if [[ -n $LEFT && -z $KEEP$EXISTING && $ACTION == run ]]; then
        say "deleting the slice $NAME"
        ! remove || LEFT=""
    fi
    if [[ -n $LEFT ]]; then
        say "THE SLICE $NAME MAY STILL RUN, and is billed until it is deleted:" \
            "bash launch/tpu_vm.sh delete --name=$NAME --zone=$ZONE" \
            "${PROJECT:+--project=$PROJECT}"
    fi
    exit "$status"
}

main() {
    exec 3>&1
    parse "$@"
    check
    TEMPORARY=$(mktemp -d)
    trap finish EXIT
    trap 'on_signal INT' INT
    trap 'on_signal TERM' TERM
    case $ACTION in
        create) bring_up ;;
        stop) on_hosts "$(worker stop TERM)" ;;
        delete) remove ;;
        *) "$ACTION" ;; # run, copy
    esac
}

main "$@"
