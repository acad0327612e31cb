"""Where the time of a layer goes on the CPU: python tests/speed/cpu_parts.py

Each part alone, in the shapes of one layer of three settings (d_model 256, 8 heads of
32, d_inner 1024, 8 rows, float32), beside the attention operation as a whole and one
large product, which is what this machine can do. Parts repeat inside of one compiled
loop, as layers do, so that no time goes into fresh memory. The median of 7 turns; all
parts take turns.
"""

import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xlformer.kernels import xla
from xlformer.kernels.relative_attention import relative_attention
from xlformer.kernels.visibility import Visibility
from xlformer.layers.feed_forward import FeedForward, layer_norm

B, D, H, K, F = 8, 256, 8, 32, 1024
SETTINGS = {
    "training, T 128, M 128": dict(T=128, M=128, train=True),
    "evaluation, T 128, M 128": dict(T=128, M=128),
    "evaluation, T 80, M 640, 640 keys": dict(T=80, M=640, window=639),
}
TIMES, TURNS = 8, 7


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(0, 0.3, s), jnp.float32) for s in shapes]


def product(spec, *shapes):
    """(function, its arguments, FLOPs) of one einsum over arrays of these shapes."""
    letters = spec.split("->")[0].replace(",", "")
    sizes = dict(zip(letters, sum(shapes, ()), strict=True))
    flops = 2 * np.prod(list(sizes.values()))
    return lambda *x: jnp.einsum(spec, *x), arrays(*shapes), flops


def softmax(T, S, start_BT, window):
    """What the operation does between its products."""

    def between(content_BHTS, raw_BHTW, start_BT):
        scores_BHTS = content_BHTS + xla.relative_shift(raw_BHTW, S)
        seen = Visibility(window, start_BT).mask(np.arange(T), np.arange(S), S - T)
        scores_BHTS += jnp.where(seen, 0, jnp.finfo(jnp.float32).min)
        p_BHTS = jnp.exp(scores_BHTS - scores_BHTS.max(-1, keepdims=True))
        return p_BHTS, p_BHTS.sum(-1)

    return between, [*arrays((B, H, T, S), (B, H, T, S + 1)), start_BT], 0


def parts(*, T, M, train=False, window=None):
    """Name: (function, arguments, FLOPs). Training: forward and backward."""
    S, N = M + T, B * T
    start_BT = jnp.full((B, T), 0, jnp.int32)
    network = FeedForward(F, 0.0, jax.nn.initializers.normal(0.02), jnp.float32)
    x_BTD, norm_D = arrays((B, T, D), (D,))
    params = network.init(jax.random.key(0), x_BTD)
    operands = arrays(*[(B, T, H, K)] * 2, *[(B, S, H, K)] * 2, (S, H, K))
    projected = S if train else T  # in evaluation the memory's are cached

    def attend(*operands):
        return relative_attention(*operands, window=window, key_start_BT=start_BT)

    found = {
        "feed-forward": (
            lambda x, params: network.apply(params, x),
            [x_BTD, params],
            4 * N * D * F,
        ),
        "query or output": product("ND,DE->NE", (N, D), (D, D)),
        "keys or values": product("ND,DE->NE", (B * projected, D), (D, D)),
        "attention": (attend, operands, 6 * B * H * T * S * K),
        "layer norm": (lambda x, s: layer_norm(x, s, s, 1e-5), [x_BTD, norm_D], 0),
    }
    if train:
        found = {name: _with_backward(*part) for name, part in found.items()}
        found["Adam of one layer"] = _adam()
    found |= {
        "of attention: content product": product(
            "BTK,BSK->BTS", (B * H, T, K), (B * H, S, K)
        ),
        "of attention: position product": product(
            "HNK,HWK->HNW", (H, N, K), (H, S + 1, K)
        ),
        "of attention: shift, mask, softmax": softmax(T, S, start_BT, window),
        "of attention: values": product("BSK,BTS->BTK", (B * H, S, K), (B * H, T, S)),
    }
    return found


def _with_backward(function, arguments, flops):
    def both(*arguments):
        y, vjp = jax.vjp(function, *arguments)
        return y, vjp(y)

    return both, arguments, 3 * flops


def _adam():
    (weights,) = arrays((4 * D + 2 * F, D))
    adam = optax.scale_by_adam()
    return adam.update, [weights, adam.init(weights)], 0


def repeated(function):
    """Runs TIMES times in one program, each needing the one before.

    One number of every operand changes each time, in place: a product of two that stay
    as they are would be made once, before the loop.
    """

    def one(carry, _):
        one, arguments, _ = carry
        arguments = jax.tree.map(lambda x: _changed(x, one), arguments)
        y = function(*arguments)
        one = 1 + 1e-30 * jax.tree.leaves(y)[0].reshape(-1)[0]
        return (one, arguments, y), None

    def run(arguments):
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, *arguments))
        carry = jnp.ones(()), arguments, zeros
        return jax.lax.scan(one, carry, length=TIMES)[0][2]

    return jax.jit(run)


def _changed(x, one):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    first = (0,) * x.ndim
    return x.at[first].multiply(one.astype(x.dtype))


def main():
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, float32"
    )
    for setting, shapes in SETTINGS.items():
        cases = parts(**shapes)
        cases["one product of 2048 x 2048"] = product("MD,DN->MN", *[(2048, 2048)] * 2)
        runs = {name: repeated(function) for name, (function, _, _) in cases.items()}
        seconds = {name: [] for name in cases}
        for _ in range(TURNS + 1):  # The first one compiles.
            for name, (_, arguments, _) in cases.items():
                start = time.perf_counter()
                jax.block_until_ready(runs[name](arguments))
                seconds[name].append((time.perf_counter() - start) / TIMES)
        print(f"\n{setting:40}{'ms':>10}{'GFLOP/s':>10}")
        for name, (_, _, flops) in cases.items():
            median = statistics.median(seconds[name][1:])
            rate = f"{flops / median / 1e9:10.0f}" if flops else f"{'-':>10}"
            print(f"{name:40}{1e3 * median:10.2f}{rate}")


if __name__ == "__main__":
    main()
