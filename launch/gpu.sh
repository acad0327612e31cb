#!/usr/bin/env bash
# Measures xlformer and its PyTorch peers on one NVIDIA GPU. See --help.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=launch/environment.sh disable=SC1091
source "$ROOT/launch/environment.sh"

SECTIONS=(device kernels bench sweep wt103_train wt103_infer enwik8)
ORIGINAL=44781ed21dbaec88b280f74d9ae2877f52b492a5
NVIDIA=729963dd47e7c8bd462ad10bfac7a7b0b604e6dd
AWD_LSTM=1d466ec5875675ca6b6f0caacbb741240a29da9e
SHA_RNN=218d748022dbcf32d50bbbb4d151a9b6de3f8bba
PERFORMER=fc8b78441b1e27eb5d9b01fc738a8772cee07127
MODE=measure RESULTS=${OUT:-"$ROOT/runs/gpu"} ONLY="${SECTIONS[*]}"

usage() {
    cat <<'END'
usage: bash launch/gpu.sh [--help] [--prepare | --rehearse] [--out=DIR]
                          [--only=SECTION,SECTION]

Measures on one GPU, without a network, with a Python that has jax (CUDA), flax, optax
and orbax-checkpoint, and torch for the peers; it installs nothing. All sections take
at most 25 minutes, each at most 10, so that they can be run in calls of their own:
  device        what the machine is
  kernels       whether the implementations of attention are right on it
  bench         NVIDIA's tables and enwik8: tokens/s, MFU, memory
  sweep         tokens/s and memory against memory_length, with a plot
  wt103_train   against NVIDIA's program in its own shapes
  wt103_infer   the same for scoring
  enwik8        against the original
Tables, numbers and logs go to DIR (runs/gpu; OUT in the environment), with a page of
all tables in summary.md. A step that fails, or is over its time, stops no other.

--prepare, on a machine with a network, once: the peers, and ml_collections where
Python lacks it, into peers/ of the repository, which has to go along.
--rehearse: the same on the CPU with tiny shapes, in a few minutes. Its numbers mean
nothing.

Environment: PYTHON=/path/to/python
Exit code: 0, also if a step failed (summary.md says so); 2 wrong usage or no GPU.
END
}

parse() {
    local argument section
    for argument in "$@"; do
        case $argument in
            --help | -h) usage && exit ;;
            --prepare) MODE=prepare ;;
            --rehearse) MODE=rehearse ;;
            --out=?*) RESULTS=${argument#*=} ;;
            --only=?*) ONLY=${argument#*=} ;;
            *)
                say "error: unknown argument $argument (see --help)"
                return 2
                ;;
        esac
    done
    ONLY=${ONLY//,/ }
    for section in $ONLY; do
        if [[ " ${SECTIONS[*]} " != *" $section "* ]]; then
            say "error: --only=$section: no such section; known: ${SECTIONS[*]}"
            return 2
        fi
    done
}

# fetch FOLDER URL COMMIT DIRECTORY: one directory of a repository at a commit.
fetch() {
    local folder="$ROOT/peers/$1"
    if [[ -d $folder && ! -d $folder/.git ]]; then
        say "peers/$1 is no clone; left as it is"
        return
    fi
    if [[ ! -d $folder ]]; then
        git clone --quiet --filter=blob:none --no-checkout "$2" "$folder"
    fi
    git -C "$folder" sparse-checkout set "$4"
    git -C "$folder" checkout --quiet "$3"
    say "peers/$1 is at $3"
}

prepare() {
    local python
    python=$(find_python)
    mkdir -p "$ROOT/peers"
    fetch transformer-xl https://github.com/kimiyoung/transformer-xl "$ORIGINAL" pytorch
    fetch DeepLearningExamples https://github.com/NVIDIA/DeepLearningExamples "$NVIDIA" \
        PyTorch/LanguageModeling/Transformer-XL
    # Measured on the CPU. What it is lies at the top, which is always checked out.
    fetch awd-lstm-lm https://github.com/salesforce/awd-lstm-lm "$AWD_LSTM" data
    fetch sha-rnn https://github.com/Smerity/sha-rnn "$SHA_RNN" data
    fetch performer-pytorch https://github.com/lucidrains/performer-pytorch \
        "$PERFORMER" performer_pytorch
    "$python" -m pip download --quiet --no-deps --only-binary=:all: \
        --dest "$ROOT/peers" ml_collections==1.1.0
    say "ready; take peers/ along"
}

# Prints a Python that has what is needed.
python_with_jax() {
    local candidate
    for candidate in "${PYTHON:-}" "$ROOT/.venv/bin/python" python3 python; do
        [[ -n $candidate ]] || continue
        if "$candidate" - jax flax optax orbax etils 2>/dev/null <<'END'; then
import importlib.util, sys
sys.exit(sys.version_info < (3, 11) or not all(map(importlib.util.find_spec, sys.argv[1:])))
END
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "error: found no Python >= 3.11 with jax, flax, optax and orbax-checkpoint;" \
        "name one: PYTHON=/path/to/python"
    return 2
}

# Puts the repository, and ml_collections if Python has none, on PYTHONPATH.
python_path() {
    local python=$1 wheel
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    if "$python" -c 'import ml_collections' 2>/dev/null; then
        return
    fi
    # Pure Python: a wheel is a zip archive that Python imports from.
    wheel=$(compgen -G "$ROOT/peers/ml_collections-*.whl" | head -n 1 || true)
    export PYTHONPATH="$PYTHONPATH:$wheel"
    if [[ -z $wheel ]] || ! "$python" -c 'import ml_collections' 2>/dev/null; then
        say "error: $python has no ml_collections and there is none in peers/:" \
            "run bash launch/gpu.sh --prepare where there is a network"
        return 2
    fi
}

# step NAME SECONDS COMMAND...: its output in NAME.txt, errors in NAME.log, and what
# became of it in NAME.status.
step() {
    local name=$1 limit=$2 status=0 start=$SECONDS said
    shift 2
    [[ $MODE != rehearse ]] || limit=600 # two cores compile slowly
    say "$name: at most $limit s: $(quoted "$@")"
    # In the foreground, so that a Ctrl-C reaches the command.
    timeout --foreground --kill-after=15 "$limit" "$@" >"$RESULTS/$name.txt" \
        2>"$RESULTS/$name.log" </dev/null || status=$?
    said="ok"
    [[ $status -eq 0 ]] || said="FAILED, exit code $status"
    [[ $status -ne 124 && $status -ne 137 ]] || said="FAILED, over its $limit s"
    printf '%s, %s s\n' "$said" "$((SECONDS - start))" >"$RESULTS/$name.status"
    printf '%s\n' "$(quoted "$@")" >"$RESULTS/$name.command"
    say "$name: $(<"$RESULTS/$name.status")"
}

run_section() {
    local python=$1 peers="$ROOT/tests/peers"
    local bench=("$python" -m xlformer.bench) compare=("$python" "$peers/compare.py")
    local implementations=pallas_gpu,blocked,xla tiny=() quick=() limits=(280 220 210)
    # What is left out if the time is over comes last.
    local train=wt103_base_train_64,wt103_large_train_16,wt103_base_train_32
    local infer=wt103_base_infer_32,wt103_large_infer_32,wt103_base_infer_1
    train+=,wt103_large_train_8
    infer+=,wt103_large_infer_1,wt103_base_infer_16,wt103_large_infer_16
    local sweep=(--config=enwik8_base:batch=22 --seconds=0.5 --repeats=3
        "--sweep=memory_length:128,512,1024,2048")
    if [[ $MODE == rehearse ]]; then
        implementations=blocked,xla quick=(--quick) limits=(580 580 580)
        train=wt103_base_train_64 infer=wt103_base_infer_16
        tiny=(--rehearse --repeats=1 --seconds=0.02)
        sweep=(--config=enwik8_base:debug --seconds=0.02 --repeats=1
            "--sweep=memory_length:5,9")
        compare+=(--tiny --rounds=2 --seconds=0.1 --build_limit=500)
    else
        compare+=(--rounds=5 --seconds=1 --build_limit=150)
    fi
    case $2 in
        device)
            step device 40 "$python" "$peers/device.py"
            ;;
        kernels)
            step kernels 120 "$python" "$peers/check_kernels.py" \
                ${quick[@]+"${quick[@]}"} "--json=$RESULTS/kernels.json"
            ;;
        bench)
            step bench_enwik8 150 "${bench[@]}" --preset=enwik8 \
                "--compare=attention:$implementations" ${tiny[@]+"${tiny[@]}"} \
                "--json=$RESULTS/bench_enwik8.json"
            step bench_train 120 "${bench[@]}" --preset=nvidia_train \
                ${tiny[@]+"${tiny[@]}"} "--json=$RESULTS/bench_train.json"
            step bench_infer 120 "${bench[@]}" --preset=nvidia_inference \
                ${tiny[@]+"${tiny[@]}"} "--json=$RESULTS/bench_infer.json"
            ;;
        sweep)
            step sweep 180 "${bench[@]}" "${sweep[@]}" \
                "--compare=attention:$implementations" "--json=$RESULTS/sweep.json" \
                "--plot=$RESULTS/sweep.svg"
            ;;
        wt103_train)
            step wt103_train 300 "${compare[@]}" "--settings=$train" \
                "--limit=${limits[0]}" "--json=$RESULTS/wt103_train.json"
            ;;
        wt103_infer)
            step wt103_infer 240 "${compare[@]}" "--settings=$infer" \
                "--limit=${limits[1]}" "--json=$RESULTS/wt103_infer.json"
            ;;
        enwik8)
            step enwik8 230 "${compare[@]}" --settings=enwik8_12L_train,enwik8_24L_train \
                "--limit=${limits[2]}" "--json=$RESULTS/enwik8.json"
            ;;
    esac
}

# Of all steps that ever wrote to this folder, in the order of the sections.
summary() {
    local name fence='~~~'
    echo "# xlformer on one GPU"
    [[ $MODE != rehearse ]] || printf '\n%s\n' "A rehearsal: the numbers mean nothing."
    for name in device kernels bench_enwik8 bench_train bench_infer sweep wt103_train \
        wt103_infer enwik8; do
        [[ -f $RESULTS/$name.status ]] || continue
        printf '\n## %s: %s\n\n%s\n\n' "$name" "$(<"$RESULTS/$name.status")" "$fence"
        printf '%s\n' "\$ $(<"$RESULTS/$name.command")" "$(<"$RESULTS/$name.txt")" \
            "$fence"
        if [[ $(<"$RESULTS/$name.status") != ok* ]]; then
            printf '\nLast line of its log: %s\n' "$(tail -n 1 "$RESULTS/$name.log")"
        fi
    done
}

main() {
    parse "$@"
    if [[ $MODE == prepare ]]; then
        prepare
        return
    fi
    if [[ $MODE == rehearse ]]; then
        export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=""
    elif ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
        say "error: nvidia-smi finds no GPU here; --rehearse does the same on the CPU"
        return 2
    fi
    local python section
    python=$(python_with_jax)
    python_path "$python"
    # The peers and JAX are on the card together. What a step has printed before its
    # time is over must be in its file.
    export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
    mkdir -p "$RESULTS"
    RESULTS=$(cd "$RESULTS" && pwd -P)
    cd "$ROOT"
    for section in $ONLY; do
        run_section "$python" "$section"
        summary >"$RESULTS/summary.md"
    done
    say "all tables: $RESULTS/summary.md"
}

main "$@"
