"""Scores and continues token ids with the model that lies beside this file.

    python run_exported.py IDS                                nats of a file of ids
    python run_exported.py IDS NUM_TOKENS TEMPERATURE SEED    ids that may come after it

Needs jax, numpy and flatbuffers. manifest.json says what the programs take and give.
"""

import json
import pathlib
import sys

import jax.export
import numpy as np

HERE = pathlib.Path(__file__).parent
ABOUT = json.loads((HERE / "manifest.json").read_text("utf-8"))
PARAMS = jax.device_put(dict(np.load(HERE / "params.npz", allow_pickle=False)))


def load(program):
    return jax.jit(jax.export.deserialize((HERE / program).read_bytes()).call)


def initial(memory):
    return {k: np.full(*x["initial"]) for k, x in ABOUT["memory"][memory].items()}


def rows(*values):
    return [np.broadcast_to(x, (ABOUT["rows"], *np.shape(x))) for x in values]


def score(ids):
    T, E, resets = (ABOUT[x] for x in ("segment_length", "extended_length", "resets"))
    call, memory, nats = load("score.jax"), initial("score"), 0.0
    padded, N = np.pad(ids, (E, T)), len(ids) - 1
    for at in range(0, N, T):
        inputs, targets = padded[at:][: E + T], padded[at + E + 1 :][:T]
        begins, length = np.arange(resets) == E - at, np.int32(E + min(T, N - at))
        nll, memory = call(PARAMS, memory, *rows(inputs, targets, length, begins))
        nats += np.asarray(nll[0], np.float64).sum()
    return nats


def generate(ids, num_tokens, temperature, seed):
    read, memory, T = load("read.jax"), initial("read"), ABOUT["prompt_length"]
    padded, N, found = np.pad(ids[:-1], (0, T)), len(ids) - 1, [ids[-1]]
    for at in range(0, N, T):
        memory = read(PARAMS, memory, *rows(padded[at:][:T], np.int32(min(T, N - at))))
    cache, call = load("start.jax")(PARAMS, memory), load("next.jax")
    key = jax.random.fold_in(jax.random.key(int(seed)), 0)  # 0: the number of a row
    for number in range(int(num_tokens)):
        log_p, cache = call(PARAMS, cache, *rows(found[-1]))
        logits = (log_p[0] - log_p[0].max()) / (temperature or 1)
        drawn = jax.random.categorical(jax.random.fold_in(key, number), logits)
        found.append(np.int32(drawn if temperature else logits.argmax()))
    return found[1:]


if __name__ == "__main__":
    ids, options = np.loadtxt(sys.argv[1], np.int32, ndmin=1), sys.argv[2:]
    print(*generate(ids, *map(float, options)) if options else [score(ids)])
