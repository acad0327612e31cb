"""Times the fused GPU kernels of one attention layer with other tiles: needs a GPU.

    PYTHONPATH=. python tests/speed/gpu_tiles.py [--setting=NAME,NAME] [--json=FILE]

A line for each kernel, size of tiles, number of warps and of stages: milliseconds, the
share of the matrix units' datasheet, and the error against the tiles that `cut` chooses
(as a share of the largest number). An error that moves between runs is a race.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from xlformer.kernels import pallas_gpu
from xlformer.kernels.call import Call
from xlformer.kernels.pallas_gpu_tiles import cut
from xlformer.kernels.visibility import Visibility

SETTINGS = {
    "enwik8": dict(B=22, H=8, T=512, M=512, K=64),
    "enwik8_large": dict(B=16, H=8, T=768, M=768, K=128),
    "wt103": dict(B=64, H=8, T=192, M=192, K=64),
}
TILES = ((32, 32), (32, 64), (64, 64), (64, 128), (128, 128))
WARPS, STAGES = (4, 8), (1, 2, 3)
PEAK = 989e12  # FLOP/s in bfloat16 of an H100 SXM, NVIDIA's datasheet
THREADS = 16  # most of the time goes into compiling
GROUPS, SECONDS = 5, 0.02
# Matrix products of [T, K] by the keys that are seen: qk, qr, pv; these without pv, dp,
# dq, dqw; dk, dv; dr, by XLA.
PRODUCTS = {"forward": 3, "queries": 5, "keys too": 7, "all": 8}
GRADIENTS = {
    "queries": ("qu", "qw"),
    "keys too": ("qu", "qw", "k", "v"),
    "all": ("qu", "qw", "k", "v", "r"),
}


def inputs(*, B, H, T, M, K):
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = [(B, T, H, K)] * 2 + [(B, M + T, H, K)] * 2 + [(M + T, H, K), (B, T, H, K)]
    drawn = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    drawn[:2] = [x * K**-0.5 for x in drawn[:2]]
    return [x.astype(jnp.bfloat16) for x in drawn]


def forward(tiles, x):
    """The output, and what the backward pass takes."""
    o, (_, _, lse) = pallas_gpu._forward((tiles, None), x)
    return o, lse


def backward(tiles, names, x, o, lse, do):
    """Only the gradients of `names`: what nothing needs is not run."""
    (dx,) = pallas_gpu._backward((None, tiles), (x, o, lse), do)
    return [dx[name] for name in names]


def compiled(function, *arrays):
    try:
        return jax.jit(function).lower(*arrays).compile()
    except Exception as error:  # A compiler may raise anything.
        return " ".join(str(error).split())[:90]


def milliseconds(program, arrays) -> float:
    jax.block_until_ready(program(*arrays))
    start = time.perf_counter()
    jax.block_until_ready(program(*arrays))
    count = max(1, round(SECONDS / (time.perf_counter() - start)))
    found = []
    for _ in range(GROUPS):
        start = time.perf_counter()
        for _ in range(count):
            out = program(*arrays)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / count)
    return 1e3 * statistics.median(found)


def error(found, expected) -> float:
    return max(
        float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max())
        / float(jnp.abs(b.astype(jnp.float32)).max())
        for a, b in zip(found, expected, strict=True)
    )


def measure(name: str) -> list[dict]:
    sizes = SETTINGS[name]
    qu, qw, k, v, r, do = inputs(**sizes)
    x = {"qu": qu, "qw": qw, "k": k, "v": v, "r": r}
    visibility = Visibility()
    call = Call.of(qu, k, v, r, visibility, 0.0)
    ahead, back = cut(call), cut(call, forward=False)
    o, lse = jax.jit(functools.partial(forward, ahead))(x)
    gradients = functools.partial(backward, back, GRADIENTS["all"])
    expected = jax.jit(gradients)(x, o, lse, do)
    forms = [
        dataclasses.replace(ahead, Q=Q, N=N, warps=warps, stages=stages)
        for (Q, N), warps, stages in itertools.product(TILES, WARPS, STAGES)
    ]
    jobs = []
    for tiles in dict.fromkeys([ahead, back, *forms]):
        if tiles in (ahead, *forms):
            jobs.append((tiles, "forward", functools.partial(forward, tiles), (x,)))
        for kernel, names in GRADIENTS.items():
            # The last is no kernel's: it is the same for all tiles.
            if tiles == back or tiles in forms and kernel != "all":
                run = functools.partial(backward, tiles, names)
                jobs.append((tiles, kernel, run, (x, o, lse, do)))
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        programs = list(pool.map(lambda job: compiled(job[2], *job[3]), jobs))
    B, H, T, M, K = (sizes[n] for n in "BHTMK")
    flops = 2 * B * H * T * (M + (T + 1) / 2) * K
    rows = []
    for (tiles, kernel, _, arrays), program in zip(jobs, programs, strict=True):
        row = {
            "setting": name,
            "kernel": kernel,
            "Q": tiles.Q,
            "N": tiles.N,
            "warps": tiles.warps,
            "stages": tiles.stages,
            "chosen": tiles == (ahead if kernel == "forward" else back),
        }
        if isinstance(program, str):
            rows.append(row | {"why_not": program})
            continue
        try:
            found = program(*arrays)
            true = [o, lse] if kernel == "forward" else expected
            row["error"] = error(found, true[: len(found)])
            row["ms"] = milliseconds(program, arrays)
        except Exception as failed:  # Too much shared memory is known at the start.
            rows.append(row | {"why_not": " ".join(str(failed).split())[:90]})
            continue
        row["of_peak"] = PRODUCTS[kernel] * flops / (row["ms"] * 1e-3) / PEAK
        rows.append(row)
    return rows


def line(row: dict) -> str:
    start = (
        f"{row['setting']:<13}{row['kernel']:<9}{row['Q']:>4} x {row['N']:<4}"
        f"{row['warps']:>2} warps{row['stages']:>2} stages"
    )
    if "why_not" in row:
        return f"{start} {row['why_not']}"
    return (
        f"{start}{row['ms']:>8.3f} ms{row['of_peak']:>7.1%} error"
        f" {row['error']:.1e}" + " chosen" * row["chosen"]
    )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--setting", default=",".join(SETTINGS))
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    rows = []
    for name in args.setting.split(","):
        found = measure(name)
        found.sort(key=lambda row: (row["kernel"], row.get("ms", 1e9)))
        rows += found
        print("\n".join(map(line, found)), flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
