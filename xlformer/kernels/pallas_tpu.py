"""Relative attention as one fused TPU kernel forward and one backward.

No score ever reaches the memory outside of the chip. This file lays out the arrays and
the grid (heads, rows, tiles of queries, tiles of keys); pallas_tpu_kernels.py is
what happens in one step of it.
"""

from __future__ import annotations

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xlformer.kernels import pallas_tpu_kernels as kernels
from xlformer.kernels.call import OUTPUT_NAME, Call
from xlformer.kernels.over_mesh import attention_over_mesh
from xlformer.kernels.pallas_tpu_tiles import MOST_BYTES, cut


def attention(
    qu_BTHK,
    qw_BTHK,
    k_BSHK,
    v_BSHK,
    r_SHK,
    visibility,
    *,
    dropout_rate,
    seeds_BH2,
):
    """See kernels.relative_attention; causal only."""
    call = Call.of(qu_BTHK, k_BSHK, v_BSHK, r_SHK, visibility, dropout_rate)
    return attention_over_mesh(
        functools.partial(_on_one_device, cut(call)),
        qu_BTHK,
        qw_BTHK,
        k_BSHK,
        v_BSHK,
        r_SHK,
        visibility,
        seeds_BH2,
    )


def _on_one_device(tiles, arrays):
    o_BHTV = _attend(tiles, *_inputs(tiles, arrays))
    return jnp.swapaxes(o_BHTV[:, :, : tiles.call.T], 1, 2)


def _inputs(tiles, arrays):
    """What the kernels read: arrays by name, first tiles of keys, seeds."""
    call, B, x = tiles.call, arrays["qu"].shape[0], {}
    for name in ("qu", "qw", "k", "v"):
        if name in arrays:
            # Heads in front of positions: the last two axes of a block, which lie in
            # the registers' sublanes and lanes, are then those of a matrix.
            heads = jnp.swapaxes(arrays[name], 1, 2)
            more = tiles.Sp - call.S if name in "kv" else tiles.Tp - call.T
            x[name] = jnp.pad(heads, ((0, 0), (0, 0), (0, more), (0, 0)))
    if "r" in arrays:
        # Its row c is that of distance Tp + M - c; the first is of distance S - 1.
        before = tiles.Tp - call.T + 1
        after = tiles.Tp + tiles.Sp - before - call.S
        r_HSK = jnp.swapaxes(arrays["r"][::-1], 0, 1)
        x["r"] = jnp.pad(r_HSK, ((0, 0), (before, after), (0, 0)))
    start_BT = arrays.get("start")
    if start_BT is not None:
        start_BT = start_BT.astype(jnp.int32)
        # The edge is repeated, so that starts stay non-decreasing in the padding.
        edges = ((0, 0), (0, tiles.Tp - call.T))
        x["start"] = jnp.pad(start_BT, edges, mode="edge")[:, None]
    first = jnp.broadcast_to(tiles.first_tiles(start_BT), (B, tiles.query_tiles))
    seeds = arrays["seeds"].ravel() if call.rate else jnp.zeros(1, jnp.int32)
    return x, first.ravel(), seeds


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiles, x, first, seeds):
    return _forward(tiles, x, first, seeds)[0]


def _forward(tiles, x, first, seeds):
    # One number a query, repeated in all 128 lanes of a register: a column of width 1
    # would take the same room.
    wide = (tiles.Q, kernels.LANES)
    scratch = {"max": wide, "sum": wide, "o": (tiles.Q, tiles.call.V)}
    y = _run(kernels.forward, tiles, x, first, seeds, scratch=scratch)
    # They have a name, by which a policy of rematerialisation keeps both; then no
    # kernel runs again.
    o, lse = (checkpoint_name(y[name], OUTPUT_NAME) for name in ("o", "lse"))
    return o, (x, first, seeds, o, lse)


def _backward(tiles, saved, do):
    x, first, seeds, o, lse = saved
    call = tiles.call
    wide = (tiles.Q, kernels.LANES)
    scratch = {
        "dqu": (tiles.Q, call.K),
        "dk": (tiles.Sp, call.K),
        "dv": (tiles.Sp, call.V),
        "lse": wide,
        "delta": wide,
    }
    if call.R is not None:
        scratch["dqw"] = (tiles.Q, call.R)
        scratch["rest"] = (tiles.Q, tiles.Q)
    inputs = {**x, "o": o, "lse": lse, "do": do}
    y = _run(kernels.backward, tiles, inputs, first, seeds, scratch=scratch)
    dx = {name[1:]: dy for name, dy in y.items()}
    dx = {name: dx[name].astype(a.dtype) for name, a in x.items() if name in dx}
    return {**dx, **{name: None for name in x.keys() - dx.keys()}}, None, None


_attend.defvjp(_forward, _backward)


def _run(kernel, tiles, x, first, seeds, *, scratch):
    """One pallas_call over the grid (heads, rows, tiles of queries, tiles of keys)."""
    call = tiles.call
    B, H, Tp, _ = x["qu"].shape
    if kernel is kernels.forward:
        out = {
            "o": jax.ShapeDtypeStruct((B, H, Tp, call.V), x["v"].dtype),
            "lse": jax.ShapeDtypeStruct((B, H, 1, Tp), jnp.float32),
        }
    else:
        names = [name for name in ("qu", "qw", "k", "v") if name in x]
        out = {f"d{n}": jax.ShapeDtypeStruct(x[n].shape, x[n].dtype) for n in names}
        if call.R is not None:
            # In float32, because it is summed over rows and tiles where it lies.
            out["dr"] = jax.ShapeDtypeStruct(x["r"].shape, jnp.float32)
    if call.R is not None:
        scratch = scratch | {"raw": (tiles.Q, tiles.Q + tiles.N)}
    scratch = {name: pltpu.VMEM(shape, jnp.float32) for name, shape in scratch.items()}
    if call.starts:
        scratch["start"] = pltpu.VMEM((tiles.Q, kernels.LANES), jnp.int32)
    # In the backward kernel the gradients of keys pile up over tiles of queries, those
    # of the distances over rows too: only heads may run in any order, or on two cores.
    others = "parallel" if kernel is kernels.forward else "arbitrary"
    return pl.pallas_call(
        functools.partial(kernel, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            # First tiles and seeds: read before a step begins, to decide what is copied
            # for it.
            num_scalar_prefetch=2,
            grid=(H, B, tiles.query_tiles, tiles.key_tiles),
            in_specs=[{name: _block(tiles, name, a.shape) for name, a in x.items()}],
            out_specs={name: _block(tiles, name, a.shape) for name, a in out.items()},
            scratch_shapes=[scratch],
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", others, others, "arbitrary"),
            vmem_limit_bytes=MOST_BYTES,
        ),
        interpret=call.interpret,
    )(first, seeds, x)


def _block(tiles, name, shape):
    """Which part of an array a grid step sees."""
    # Its place depends on the head alone: it stays on the chip over all rows and tiles.
    if name in ("r", "dr"):
        return pl.BlockSpec((1, *shape[1:]), lambda h, b, q, n, *_: (h, 0, 0))
    if name == "start":
        return pl.BlockSpec((1, 1, tiles.Q), lambda h, b, q, n, *_: (b, 0, q))
    if name == "lse":
        return pl.BlockSpec((1, 1, 1, tiles.Q), lambda h, b, q, n, *_: (b, h, 0, q))
    if name in ("dk", "dv"):
        return pl.BlockSpec((1, 1, *shape[2:]), lambda h, b, q, n, *_: (b, h, 0, 0))
    if name not in ("k", "v"):
        block = (1, 1, tiles.Q, shape[3])
        return pl.BlockSpec(block, lambda h, b, q, n, *_: (b, h, q, 0))

    def seen(h, b, q, n, first, _):
        # A step out of sight asks for the tile that is there already, so that nothing
        # is copied.
        n = lax.clamp(first[b * tiles.query_tiles + q], n, tiles.last_tile(q))
        return b, h, n, 0

    return pl.BlockSpec((1, 1, tiles.N, shape[3]), seen)


def try_out(call: Call) -> None:
    """Compiles both kernels for the first device here, one row and one head.

    The numbers of rows and heads are loop bounds only. In a thread of its own: what is
    being traced around this call, its mesh above all, is none of its business. Where
    the TPU that is compiled for is not here, nothing can be asked.
    """
    if jax.default_backend() != "tpu":
        return
    tiles = cut(call)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def array(*shape, dtype=call.dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    arrays = {
        "qu": array(1, call.T, 1, call.K),
        "k": array(1, call.S, 1, call.K),
        "v": array(1, call.S, 1, call.V),
    }
    if call.R is not None:
        arrays |= {"qw": array(1, call.T, 1, call.R), "r": array(call.S, 1, call.R)}
    other = {"start": array(1, call.T, dtype="int32")} if call.starts else {}
    if call.rate:
        other["seeds"] = array(1, 1, 2, dtype="int32")

    def loss(arrays, other):
        return _on_one_device(tiles, {**arrays, **other}).astype(jnp.float32).sum()

    def compile_both():
        jax.jit(jax.grad(loss)).lower(arrays, other).compile()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(compile_both).result()
