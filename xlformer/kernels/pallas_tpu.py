"""Relative attention as one fused TPU kernel forward and one backward.

No score ever reaches the memory outside of the chip. This file lays out the arrays and
the grid (heads, rows, tiles of queries, tiles of keys); pallas_tpu_tiles.py is what
happens in one step of it.
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

from xlformer.kernels import dma
from xlformer.kernels import pallas_tpu_tiles as tiles
from xlformer.kernels.case import OUTPUT_NAME, Case
from xlformer.kernels.over_mesh import attention_over_mesh
from xlformer.kernels.pallas_tpu_case import MOST_BYTES, Tiles


def attention(
    qu_BTHK,
    qw_BTHK,
    k_BSHK,
    v_BSHK,
    r_SHK,
    *,
    window,
    key_start_BT,
    causal,
    dropout_rate,
    seeds_BH2,
):
    """See kernels.relative_attention; causal only."""
    case = Tiles.of(
        *(qu_BTHK, k_BSHK, v_BSHK, r_SHK),
        key_start_BT=key_start_BT,
        window=window,
        causal=causal,
        rate=dropout_rate,
    )
    return attention_over_mesh(
        functools.partial(_on_one_device, case),
        *(qu_BTHK, qw_BTHK, k_BSHK, v_BSHK, r_SHK),
        key_start_BT=key_start_BT,
        seeds_BH2=seeds_BH2,
    )


def _on_one_device(case, arrays):
    o_BHTV = _attend(case, *_inputs(case, arrays))
    return jnp.swapaxes(o_BHTV[:, :, : case.T], 1, 2)


def _inputs(case, arrays):
    """What the kernels read: arrays by name, first tiles of keys, seeds."""
    B = arrays["qu"].shape[0]
    x = {}
    for name in ("qu", "qw", "k", "v"):
        if name in arrays:
            heads = jnp.swapaxes(arrays[name], 1, 2)
            more = (case.Sp - case.S) if name in "kv" else (case.Tp - case.T)
            x[name] = jnp.pad(heads, ((0, 0), (0, 0), (0, more), (0, 0)))
    if "r" in arrays:
        # Row c of the table is distance Tp + M - c: the first is distance S - 1.
        before = case.Tp - case.T + 1
        after = case.Tp + case.Sp - before - case.S
        r_HSK = jnp.swapaxes(arrays["r"][::-1], 0, 1)
        x["table"] = jnp.pad(r_HSK, ((0, 0), (before, after), (0, 0)))
    start_BT = arrays.get("start")
    if start_BT is not None:
        start_BT = start_BT.astype(jnp.int32)
        edges = ((0, 0), (0, case.Tp - case.T))
        x["start"] = jnp.pad(start_BT, edges, mode="edge")[:, None]
    first = jnp.broadcast_to(case.first_tiles(start_BT), (B, case.query_tiles)).ravel()
    seeds = arrays["seeds"].ravel() if case.rate else jnp.zeros(1, jnp.int32)
    return x, first, seeds


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(case, x, first, seeds):
    return _forward(case, x, first, seeds)[0]


def _forward(case, x, first, seeds):
    wide = (case.Q, tiles.LANES)
    scratch = {"max": wide, "sum": wide, "o": (case.Q, case.V)}
    y = _call(tiles.forward, case, x, first, seeds, scratch=scratch)
    # Under a name: with both kept, rematerialisation runs no kernel again.
    o, lse = (checkpoint_name(y[name], OUTPUT_NAME) for name in ("o", "lse"))
    return o, (x, first, seeds, o, lse)


def _backward(case, saved, do):
    x, first, seeds, o, lse = saved
    wide = (case.Q, tiles.LANES)
    scratch = {
        "dqu": (case.Q, case.K),
        "dk": (case.Sp, case.K),
        "dv": (case.Sp, case.V),
        "lse": wide,
        "delta": wide,
    }
    if case.R is not None:
        scratch["dqw"] = (case.Q, case.R)
        scratch["rest"] = (case.Q, case.Q)
    inputs = {**x, "o": o, "lse": lse, "do": do}
    y = _call(tiles.backward, case, inputs, first, seeds, scratch=scratch)
    dx = {name[1:]: dy for name, dy in y.items()}
    dx = {name: dx[name].astype(a.dtype) for name, a in x.items() if name in dx}
    return {**dx, **{name: None for name in x.keys() - dx.keys()}}, None, None


_attend.defvjp(_forward, _backward)


def _layout(kernel, case, x):
    """(grid, the shapes of what comes out, the block of each array in a grid step)."""
    B, H, Tp, _ = x["qu"].shape
    if kernel is tiles.forward:
        out = {
            "o": jax.ShapeDtypeStruct((B, H, Tp, case.V), x["v"].dtype),
            "lse": jax.ShapeDtypeStruct((B, H, 1, Tp), jnp.float32),
        }
    else:
        names = [name for name in ("qu", "qw", "k", "v") if name in x]
        out = {f"d{n}": jax.ShapeDtypeStruct(x[n].shape, x[n].dtype) for n in names}
        if case.R is not None:
            out["dtable"] = jax.ShapeDtypeStruct(x["table"].shape, jnp.float32)
    grid = H, B, case.query_tiles, case.Sp // case.N
    blocks = {name: _block(case, name, a.shape) for name, a in {**x, **out}.items()}
    return grid, out, blocks


def _call(kernel, case, x, first, seeds, *, scratch):
    """One pallas_call over the grid (heads, rows, tiles of queries, tiles of keys)."""
    grid, out, blocks = _layout(kernel, case, x)
    if case.R is not None:
        scratch = scratch | {"raw": (case.Q, case.Q + case.N)}
    scratch = {name: pltpu.VMEM(shape, jnp.float32) for name, shape in scratch.items()}
    if case.starts:
        scratch["start"] = pltpu.VMEM((case.Q, tiles.LANES), jnp.int32)
    # In the backward kernel gradients of keys pile up over all but the heads.
    others = "parallel" if kernel is tiles.forward else "arbitrary"
    return pl.pallas_call(
        functools.partial(kernel, shape=case),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[{name: blocks[name] for name in x}],
            out_specs={name: blocks[name] for name in out},
            scratch_shapes=[scratch],
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", others, others, "arbitrary"),
            vmem_limit_bytes=MOST_BYTES,
        ),
        interpret=case.interpret,
    )(first, seeds, x)


def _block(case, name, shape):
    """Which part of an array a grid step sees."""
    if name in ("table", "dtable"):
        return pl.BlockSpec((1, *shape[1:]), lambda h, b, q, n, *_: (h, 0, 0))
    if name == "start":
        return pl.BlockSpec((1, 1, case.Q), lambda h, b, q, n, *_: (b, 0, q))
    if name == "lse":
        return pl.BlockSpec((1, 1, 1, case.Q), lambda h, b, q, n, *_: (b, h, 0, q))
    if name in ("dk", "dv"):
        return pl.BlockSpec((1, 1, *shape[2:]), lambda h, b, q, n, *_: (b, h, 0, 0))
    if name not in ("k", "v"):
        block = (1, 1, case.Q, shape[3])
        return pl.BlockSpec(block, lambda h, b, q, n, *_: (b, h, q, 0))

    def seen(h, b, q, n, first, _):
        # A step out of sight asks for the tile that is there: nothing is copied.
        n = lax.clamp(first[b * case.query_tiles + q], n, case.last_tile(q))
        return b, h, n, 0

    return pl.BlockSpec((1, 1, case.N, shape[3]), seen)


def copied_bytes(case: Tiles, *, rows: int, heads: int, start_BT=None) -> dict:
    """What {'forward': ..., 'backward': ...} copy; see kernels/dma.py.

    start_BT: of a case with starts, by default those of a full memory.
    """
    inputs = functools.partial(_inputs, case)
    x, _, _ = jax.eval_shape(inputs, _arguments(case, rows, heads))
    first = jnp.broadcast_to(case.first_tiles(start_BT), (rows, case.query_tiles))

    def copied(kernel, x):
        grid, out, blocks = _layout(kernel, case, x)
        arrays, scalars = {**x, **out}, (first.ravel(), None)
        found = dma.copied_bytes(grid, blocks, arrays, scalars=scalars)
        return out, sum(found.values())

    out, forward = copied(tiles.forward, x)
    _, backward = copied(tiles.backward, {**x, **out, "do": out["o"]})
    return {"forward": forward, "backward": backward}


def _arguments(case: Tiles, B: int, H: int, **options) -> dict:
    """Shapes of what `attention` is called with."""

    def array(*shape, dtype=case.dtype):
        return jax.ShapeDtypeStruct(shape, dtype, **options)

    found = {
        "qu": array(B, case.T, H, case.K),
        "k": array(B, case.S, H, case.K),
        "v": array(B, case.S, H, case.V),
    }
    if case.R is not None:
        found["qw"] = array(B, case.T, H, case.R)
        found["r"] = array(case.S, H, case.R)
    if case.starts:
        found["start"] = array(B, case.T, dtype="int32")
    if case.rate:
        found["seeds"] = array(B, H, 2, dtype="int32")
    return found


def try_out(case: Case) -> None:
    """Compiles both kernels for the first device here, one row and one head.

    The numbers of rows and heads are loop bounds only. In a thread of its own: what is
    being traced around this call, its mesh above all, is none of its business. Where
    the TPU that is compiled for is not here, nothing can be asked.
    """
    if jax.default_backend() != "tpu":
        return
    case = Tiles.cut(case)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    arguments = _arguments(case, 1, 1, sharding=device)
    other = {k: arguments.pop(k) for k in ("start", "seeds") if k in arguments}

    def loss(arrays, other):
        return _on_one_device(case, {**arrays, **other}).astype(jnp.float32).sum()

    def compile_both():
        jax.jit(jax.grad(loss)).lower(arguments, other).compile()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(compile_both).result()
