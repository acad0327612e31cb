"""Is linear attention linear? Time and memory over the length, beside softmax's:

    PYTHONPATH=. python tests/speed/linear_cost.py [--rows=1] [--softmax=6144]

One layer's operation, 8 heads of 64, 256 positive features, float32 on a CPU and
bfloat16 elsewhere; softmax attention (what attention=auto chooses) up to the length
that is given. Temporaries are those of the compiled program. All lengths of a kind run
in turns, each as often as makes 12,288 tokens or more, so that other work on the
machine slows short and long ones alike; a time is the median of 5 rounds.

Exit code 1 if, from T = 3,072 to 12,288, temporaries of linear attention, forward or
forward and backward, grow more than 4.4 times, or its tokens/s fall below 0.8 times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from xlformer.kernels.features import Features
from xlformer.kernels.linear_attention import linear_attention
from xlformer.kernels.relative_attention import relative_attention

H, K, M = 8, 64, 256
LENGTHS = (1024, 2048, 3072, 6144, 12288)
SHORT, LONG = 3072, 12288
MOST_GROWTH, LEAST_RATE = 4.4, 0.8
ROUNDS = 5


def favor(causal):
    def attend(q, k, v, w):
        scale = K**-0.25
        options = dict(causal=causal)
        return linear_attention(q * scale, k * scale, v, Features(), w, **options)[0]

    return attend


def softmax(q, k, v, w):
    del w
    return relative_attention(q * K**-0.5, None, k, v, None)


KINDS = {
    "linear, causal": favor(True),
    "linear, bidirectional": favor(False),
    "softmax, causal": softmax,
}


def with_backward(attend):
    def loss(q, k, v, w):
        y = attend(q, k, v, w)
        return (y * y).sum().astype(jnp.float32)

    return jax.grad(loss, argnums=(0, 1, 2))


def inputs(rows: int, T: int, dtype):
    rng = np.random.default_rng(0)
    shapes = [(rows, T, H, K)] * 3 + [(M, K)]
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def measure(attend, lengths, rows, dtype) -> dict:
    """{T: (seconds, bytes of temporaries)}."""
    runs, arrays, seconds, temporaries = {}, {}, {}, {}
    for T in lengths:
        arrays[T] = inputs(rows, T, dtype)
        runs[T] = jax.jit(attend).lower(*arrays[T]).compile()
        temporaries[T] = runs[T].memory_analysis().temp_size_in_bytes
        jax.block_until_ready(runs[T](*arrays[T]))
    for _ in range(ROUNDS):
        for T, run in runs.items():
            times = -(-LONG // T)
            start = time.perf_counter()
            for _ in range(times):
                jax.block_until_ready(run(*arrays[T]))
            each = (time.perf_counter() - start) / times
            seconds.setdefault(T, []).append(each)
    return {T: (statistics.median(seconds[T]), temporaries[T]) for T in lengths}


def line(T, rows, forward, both) -> str:
    rate = rows * T / both[0]
    memory = f"{forward[1] / 2**20:10.0f}{both[1] / 2**20:10.0f}"
    times = f"{1e3 * forward[0]:10.1f}{1e3 * both[0]:10.1f}"
    return f"{T:>8,}{times}{rate:>12,.0f}{memory}"


def missed(what: str, found: dict) -> list[str]:
    """The requirements that a kind misses, each as a line."""
    lines = []
    growth = found[LONG][1] / found[SHORT][1]
    rate = LONG / found[LONG][0] / (SHORT / found[SHORT][0])
    print(f"{what}: temporaries x {growth:.2f}, tokens/s x {rate:.2f}")
    if growth > MOST_GROWTH:
        lines.append(f"{what}: temporaries grow {growth:.2f} times")
    if rate < LEAST_RATE:
        lines.append(f"{what}: tokens/s are {rate:.2f} times those of {SHORT:,}")
    return lines


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--softmax", type=int, default=6144, help="its longest T")
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    print(
        f"{device.device_kind}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"jax {jax.__version__}, {dtype.__name__}, {args.rows} rows, {H} heads of {K}"
    )
    wrong = []
    for kind, attend in KINDS.items():
        most = args.softmax if attend is softmax else LONG
        lengths = [T for T in LENGTHS if T <= most]
        print(f"\n{kind}\n{'T':>8}{'forward':>10}{'both':>10}{'tokens/s':>12}", end="")
        print(f"{'MiB fwd':>10}{'both':>10}   (ms; tokens/s of both)")
        forward = measure(attend, lengths, args.rows, dtype)
        both = measure(with_backward(attend), lengths, args.rows, dtype)
        for T in lengths:
            print(line(T, args.rows, forward[T], both[T]), flush=True)
        if attend is not softmax:
            wrong += missed(f"{kind}, forward", forward)
            wrong += missed(f"{kind}, both", both)
    print("\n" + ("\n".join(wrong) or "linear"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
