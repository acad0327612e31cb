#!/usr/bin/env bash
# Trains, evaluates or generates on a TPU slice or on GPU machines of a Google Kubernetes
# Engine cluster: fills in gke.yaml, a JobSet, and applies, follows or deletes it. See
# --help and launch/README.md.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=launch/environment.sh disable=SC1091
source "$ROOT/launch/environment.sh"

ACTION=start COMMAND=train NAME="" NAMESPACE="" IMAGE="" ACCELERATOR="" TOPOLOGY=""
CHIPS_PER_HOST=4 GPUS_PER_HOST="" HOSTS=1 SERVICE_ACCOUNT=default
MAX_RESTARTS=10 GRACE_SECONDS=120 SPOT="" KEEP="" DRY=""
CONFIG="" WORKDIR="" ARGUMENTS=()
POLL_SECONDS=${POLL_SECONDS:-10}

usage() {
    cat <<'END'
usage: bash launch/gke.sh [train|evaluate|generate] --name=NAME --image=IMAGE
           --accelerator=tpu-v5-lite-podslice --topology=4x4
           --workdir=gs://BUCKET/DIR --config=NAME [FLAGS] [ARGUMENTS OF THE COMMAND]
       the same with --accelerator=nvidia-h100-80gb --gpus_per_host=8 --hosts=2
       bash launch/gke.sh follow|delete --name=NAME [--namespace=NAMESPACE]

Applies a JobSet that runs the command (train), follows host 0, deletes the JobSet when it
is complete. follow: to its end. delete: the hosts save first. --config is train's only.

--chips_per_host=4    TPU: of the node pool's machine type
--gpus_per_host=N     GPU: of the node pool's machine type    --hosts=1
--service_account=    of Kubernetes, with access to the bucket (default)
--namespace=          (kubectl's)        --spot    a node pool of spot VMs
--max_restarts=10     --grace_seconds=120, from SIGTERM to SIGKILL
--keep                does not delete when complete
--dry-run             prints the JobSet and the commands, runs none
Exit code: 0 complete, 1 failed, 2 wrong usage.
END
}

parse() {
    local argument
    case ${1:-} in
        follow | delete) ACTION=$1 && shift ;;
        *) ! is_command "${1:-}" || { COMMAND=$1 && shift; } ;;
    esac
    for argument in "$@"; do
        case $argument in
            --help | -h) usage && exit ;;
            --spot) SPOT=yes ;;
            --keep) KEEP=yes ;;
            --dry-run) DRY=yes ;;
            --name=*) NAME=${argument#*=} ;;
            --namespace=*) NAMESPACE=${argument#*=} ;;
            --image=*) IMAGE=${argument#*=} ;;
            --accelerator=*) ACCELERATOR=${argument#*=} ;;
            --topology=*) TOPOLOGY=${argument#*=} ;;
            --chips_per_host=*) CHIPS_PER_HOST=${argument#*=} ;;
            --gpus_per_host=*) GPUS_PER_HOST=${argument#*=} ;;
            --hosts=*) HOSTS=${argument#*=} ;;
            --service_account=*) SERVICE_ACCOUNT=${argument#*=} ;;
            --max_restarts=*) MAX_RESTARTS=${argument#*=} ;;
            --grace_seconds=*) GRACE_SECONDS=${argument#*=} ;;
            --workdir=*) WORKDIR=${argument#*=} && ARGUMENTS+=("$argument") ;;
            --config=*) CONFIG=${argument#*=} && ARGUMENTS+=("$argument") ;;
            --config.*=* | --manual_dir=* | --init_from=*) ARGUMENTS+=("$argument") ;;
            --*=*) # train's are all above: a typo must not cost machines
                [[ $COMMAND != train ]] || bad "$argument: unknown (see --help)"
                ARGUMENTS+=("$argument")
                ;;
            *) bad "$argument: unknown, or without its =VALUE (see --help)" ;;
        esac
    done
}

check() {
    [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
        bad "--name=$NAME: 1 to 40 of a-z, 0-9 and -, a letter first"
    [[ $ACTION == start ]] || return 0
    [[ -n $IMAGE ]] || bad "--image= is missing (see --help)"
    [[ -n $ACCELERATOR ]] || bad "--accelerator= is missing (see --help)"
    [[ -n $CONFIG || $COMMAND != train ]] || bad "--config= is missing (see --help)"
    if [[ -n $GPUS_PER_HOST ]]; then
        [[ -z $TOPOLOGY ]] ||
            bad "--topology=$TOPOLOGY is of TPUs, --gpus_per_host=$GPUS_PER_HOST is not"
        number gpus_per_host "$GPUS_PER_HOST" 1
        number hosts "$HOSTS" 1
    else
        [[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
            bad "--topology=$TOPOLOGY: not like 4x4 or 2x2x2 (GPUs: --gpus_per_host=8)"
        [[ $HOSTS == 1 ]] || bad "--hosts=$HOSTS: those of TPUs follow from --topology"
    fi
    [[ $WORKDIR == gs://* ]] ||
        bad "--workdir=$WORKDIR: a host's own disk goes with it; gs://BUCKET/DIR"
    number chips_per_host "$CHIPS_PER_HOST" 1
    number max_restarts "$MAX_RESTARTS" 1
    number grace_seconds "$GRACE_SECONDS" 1
}

fill() {
    local python
    python=$(find_python)
    "$python" "$ROOT/launch/gke_fill.py" "name=$NAME" "image=$IMAGE" \
        "accelerator=$ACCELERATOR" "topology=$TOPOLOGY" "spot=$SPOT" \
        "chips_per_host=$CHIPS_PER_HOST" "gpus_per_host=$GPUS_PER_HOST" \
        "hosts=$HOSTS" "service_account=$SERVICE_ACCOUNT" "bad_input=$BAD_INPUT" \
        "max_restarts=$MAX_RESTARTS" "grace_seconds=$GRACE_SECONDS" \
        -- "$COMMAND" "${ARGUMENTS[@]}"
}

kube() {
    local words=(kubectl ${NAMESPACE:+"--namespace=$NAMESPACE"} "$@")
    if [[ -n $DRY ]]; then
        echo "+ $(quoted "${words[@]}")"
    else
        "${words[@]}"
    fi
}

apply() {
    local jobset
    jobset=$(fill) || exit "$BAD_INPUT"
    [[ -z $DRY ]] || printf '%s\n' "$jobset"
    # No pipe: a dry run reads nothing, and printf would die of it.
    kube apply -f - <<<"$jobset"
}

# Prints the output of host 0, of one pod after the other, until the JobSet has ended.
follow() {
    local state pod last="" since host0
    host0="jobset.sigs.k8s.io/jobset-name=$NAME"
    host0+=",batch.kubernetes.io/job-completion-index=0"
    local get_pod=(get pods "--selector=$host0" --field-selector=status.phase=Running
        "--output=jsonpath={.items[*].metadata.name}")
    local get_state=(get jobset "$NAME"
        '--output=jsonpath={.status.conditions[?(@.status=="True")].type}')
    if [[ -n $DRY ]]; then
        kube "${get_state[@]}"
        kube "${get_pod[@]}"
        kube logs --follow --container=xlformer POD
        return
    fi
    say "following $NAME; after a Ctrl-C it goes on: 'follow' and 'delete' are commands"
    while :; do
        state=$(kube "${get_state[@]}")
        case " $state " in
            *" Completed "*) return ;;
            *" Failed "*)
                kube get jobset "$NAME" \
                    '--output=jsonpath={.status.conditions[?(@.type=="Failed")].message}'
                say "$NAME has failed; it is kept for you to look at, then: delete"
                return 1
                ;;
        esac
        pod=$(kube "${get_pod[@]}")
        pod=${pod%% *}
        if [[ -n $pod ]]; then
            # The same pod again: the connection was lost, not the host.
            since=()
            [[ $pod != "$last" ]] || since=("--since=${POLL_SECONDS}s")
            last=$pod
            kube logs --follow --container=xlformer ${since[@]+"${since[@]}"} "$pod" || true
        fi
        sleep "$POLL_SECONDS"
    done
}

main() {
    parse "$@"
    check
    case $ACTION in
        start)
            apply
            follow
            [[ -n $KEEP ]] || kube delete jobset "$NAME"
            ;;
        follow) follow ;;
        delete) kube delete jobset "$NAME" ;;
    esac
}

main "$@"
