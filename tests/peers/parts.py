"""GFLOP/s of the parts of the CPU settings, in XLA and in PyTorch.

    JAX_PLATFORMS=cpu PYTHONPATH=. python tests/peers/parts.py [--setting=cpu_eval]

What a layer is made of, each product alone and in turns: how far both libraries' own
products are apart, and which of them hold a step back. Of an LSTM also its layers and
its loss as wholes, forward and backward (lstm_parts.py). CPU, float32.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import compare
import jax
import lstm_parts
import numpy as np
import settings
import torch

ROUNDS, SECONDS = 9, 0.1  # of each product in each turn


def products(setting) -> dict:
    """{part: (einsum of both libraries, shape, shape)} of the forward pass.

    Of a Transformer-XL these of one layer, of an LSTM of each that differs.
    """
    if isinstance(setting, settings.Recurrent):
        return lstm_parts.products(setting)
    B, T, M = setting.batch_size, setting.segment_length, setting.memory_length
    N, S = B * T, M + T
    d, F, H, K = setting.d_model, setting.d_inner, setting.n_head, setting.d_head
    W = H * K
    return {
        "queries, keys, values": ("nd,dw->nw", (N, d), (d, 3 * W)),
        "keys, values of the memory": ("nd,dw->nw", (B * M, d), (d, 2 * W)),
        "content scores": ("zth,zsh->zts", (B * H, T, K), (B * H, S, K)),
        "position scores": ("zth,zsh->zts", (H, B * T, K), (H, S, K)),
        "values": ("zts,zsh->zth", (B * H, T, S), (B * H, S, K)),
        "output": ("nw,wd->nd", (N, W), (W, d)),
        "feed-forward in": ("nd,df->nf", (N, d), (d, F)),
        "feed-forward out": ("nf,fd->nd", (N, F), (F, d)),
        "vocabulary": ("nd,vd->nv", (N, d), (setting.vocab_size, d)),
    }


def flops(spec: str, a: tuple, b: tuple) -> float:
    left, _, _ = spec.partition("->")
    one, _, two = left.partition(",")
    sizes = dict(zip(one, a, strict=True)) | dict(zip(two, b, strict=True))
    return 2.0 * float(np.prod(list(sizes.values())))


def rate(function, count: float) -> float:
    """GFLOP/s over about SECONDS."""
    times, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        function()
        times += 1
    return times * count / (time.perf_counter() - start) / 1e9


def both(spec: str, *shapes: tuple) -> list:
    """The same product in XLA and in PyTorch."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s, np.float32) for s in shapes]
    here = [jax.device_put(x) for x in arrays]
    there = [torch.from_numpy(x) for x in arrays]
    product = jax.jit(functools.partial(jax.numpy.einsum, spec))
    return [
        lambda: product(*here).block_until_ready(),
        lambda: torch.einsum(spec, *there),
    ]


def rates(functions, count: float) -> list[float]:
    """Median GFLOP/s of XLA and of PyTorch, timed in turns."""
    turns = [[rate(f, count) for f in functions] for _ in range(ROUNDS)]
    return [statistics.median(each) for each in zip(*turns[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--setting", default="cpu_eval", choices=settings.SETTINGS)
    args = parser.parse_args()
    setting = settings.SETTINGS[args.setting]
    print(f"{compare.host()}, jax {jax.__version__}, torch {torch.__version__}")
    print(f"{args.setting}: {setting}")
    print(f"{'GFLOP/s':<28}{'MFLOP':>8}{'XLA':>8}{'PyTorch':>9}{'ratio':>7}")
    timed = [
        (part, flops(spec, *shapes), both(spec, *shapes))
        for part, (spec, *shapes) in products(setting).items()
    ]
    if isinstance(setting, settings.Recurrent):
        timed += lstm_parts.wholes(setting)
    for part, count, functions in timed:
        xla, other = rates(functions, count)
        print(
            f"{part:<28}{count / 1e6:>8.0f}{xla:>8.0f}{other:>9.0f}{xla / other:>7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
