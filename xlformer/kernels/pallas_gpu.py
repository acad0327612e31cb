"""Relative attention as fused GPU kernels, by Pallas and Triton.

Forward no score reaches the memory outside of the chip, but for a ring of tiles in its
L2 cache. Backward is two kernels and a matrix product, without atomic additions, so
that it gives the same bits each time: between them stand the probabilities and the
gradients of the scores of one layer. pallas_gpu_kernels.py is what one program does.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from xlformer.kernels import pallas_gpu_kernels as kernels
from xlformer.kernels import xla
from xlformer.kernels.call import OUTPUT_NAME, Call
from xlformer.kernels.over_mesh import attention_over_mesh
from xlformer.kernels.pallas_gpu_tiles import GPUTiles, cut

# A share of the largest number, of which rounding to bfloat16 alone takes 0.01.
TOLERANCE = 0.05


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
        functools.partial(_on_one_device, (cut(call), cut(call, forward=False))),
        qu_BTHK,
        qw_BTHK,
        k_BSHK,
        v_BSHK,
        r_SHK,
        visibility,
        seeds_BH2,
    )


def _on_one_device(tiles: tuple[GPUTiles, GPUTiles], arrays):
    x = dict(arrays)
    for name in ("qu", "qw", "k", "v", "r"):
        if name in x:
            # Rows are padded to a multiple of 16 bytes: the GPU reads others one number
            # at a time.
            width = x[name].shape[-1]
            edges = [(0, 0)] * (x[name].ndim - 1) + [(0, -width % 8)]
            x[name] = jnp.pad(x[name], edges)
    if "start" in x:
        x["start"] = x["start"].astype(jnp.int32)
    o_BTHV = _attend(tiles, x)
    return o_BTHV[..., : tiles[0].call.V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiles, x):
    """tiles: of the forward and of the backward kernels."""
    return _forward(tiles, x)[0]


def _with_first(tiles: GPUTiles, x):
    """And the first tile of keys of each tile of queries, in tiles of this size."""
    first = tiles.first_tiles(x.get("start"))
    shape = x["qu"].shape[0], tiles.query_tiles
    return {**x, "first": jnp.broadcast_to(first, shape)}


def _forward(tiles, x):
    tiles, _ = tiles
    B, T, H, _ = x["qu"].shape
    out = {
        "o": jax.ShapeDtypeStruct((B, T, H, x["v"].shape[-1]), x["v"].dtype),
        "lse": jax.ShapeDtypeStruct((B, H, T), jnp.float32),
    }
    given = _with_first(tiles, x)
    y = _run(kernels.forward, tiles, given, out | _ring(tiles, B, H))
    # They have a name, by which a policy of rematerialisation keeps both; then no
    # kernel runs again.
    o, lse = (checkpoint_name(y[name], OUTPUT_NAME) for name in ("o", "lse"))
    return o, (x, o, lse)


def _backward(tiles, saved, do):
    (_, tiles), (x, o, lse) = tiles, saved
    (B, T, H, _), S = x["qu"].shape, x["k"].shape[1]
    # 16 bytes of bfloat16, as for the rows of the inputs.
    pitch = -(-tiles.columns // 8) * 8

    def like(name):
        return jax.ShapeDtypeStruct(x[name].shape, x[name].dtype)

    out = {
        "dqu": like("qu"),
        # Probabilities and gradients of scores stand in the dtype of the matrix
        # products that read them.
        "p": jax.ShapeDtypeStruct((B, H, T, -(-S // 8) * 8), do.dtype),
        # Heads first: then the sum over rows and queries is one matrix product.
        "dscores": jax.ShapeDtypeStruct((H, B, T, pitch), x["k"].dtype),
    }
    if "r" in x:
        out["dqw"] = like("qw")
    given = {**_with_first(tiles, x), "o": o, "lse": lse, "do": do}
    y = _run(kernels.backward_queries, tiles, given, out | _ring(tiles, B, H))
    given = {name: given[name] for name in ("qu", "do", "first")}
    given |= {name: y[name] for name in ("p", "dscores")}
    out = {"dk": like("k"), "dv": like("v")}
    dk_dv = _run(kernels.backward_keys, tiles, given, out)
    # None is the gradient of what has none: starts and seeds are integers.
    dx = dict.fromkeys(x)
    dx |= {"qu": y["dqu"], "k": dk_dv["dk"], "v": dk_dv["dv"]}
    if "r" in x:
        dx["qw"], dx["r"] = y["dqw"], _distance_gradient(tiles, y["dscores"], x)
    return (dx,)


_attend.defvjp(_forward, _backward)


def _distance_gradient(tiles, dscores_HBTC, x):
    with jax.named_scope("distances"):
        dr_HCK = jnp.einsum(
            "HBTC,BTHK->HCK",
            dscores_HBTC,
            x["qw"],
            preferred_element_type=jnp.float32,
        )
        # The last column is distance 0.
        columns, S = tiles.columns, tiles.call.S
        dr_HSK = dr_HCK[:, columns - S : columns][:, ::-1]
        return jnp.swapaxes(dr_HSK, 0, 1).astype(x["r"].dtype)


def _ring(tiles, B, H):
    if tiles.call.R is None:
        return {}
    ring = (B, H, tiles.query_tiles, tiles.Q, 2 * tiles.N)
    return {"ring": jax.ShapeDtypeStruct(ring, jnp.float32)}


def _run(kernel, tiles, x, out):
    """One pallas_call over (tiles of queries or of keys, heads, rows)."""
    B, _, H, _ = x["qu"].shape
    # Each program writes what is its own, queries or keys, so none adds to another's
    # result: an atomic addition would round in another order each time.
    of_keys = kernel is kernels.backward_keys
    return pl.pallas_call(
        functools.partial(kernel, tiles=tiles),
        grid=(tiles.key_tiles if of_keys else tiles.query_tiles, H, B),
        in_specs=[{name: _block(name, a.shape) for name, a in x.items()}],
        out_specs={name: _block(name, a.shape) for name, a in out.items()},
        out_shape=out,
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.warps, num_stages=tiles.stages
        ),
        interpret=tiles.call.interpret,
        name=f"relative_attention_{kernel.__name__}",
    )(x)


def _block(name, shape):
    """Which part of an array a program sees: its row and head."""
    if name in ("first", "start"):
        return pl.BlockSpec((None, shape[1]), lambda i, h, b: (b, 0))
    if name == "r":
        return pl.BlockSpec((shape[0], None, shape[2]), lambda i, h, b: (0, h, 0))
    if name in ("seeds", "lse"):
        return pl.BlockSpec((None, None, shape[2]), lambda i, h, b: (b, h, 0))
    if name == "ring":
        block = (None, None, None, *shape[3:])
        return pl.BlockSpec(block, lambda i, h, b: (b, h, i, 0, 0))
    if name == "p":
        return pl.BlockSpec((None, None, *shape[2:]), lambda i, h, b: (b, h, 0, 0))
    if name == "dscores":
        return pl.BlockSpec((None, None, *shape[2:]), lambda i, h, b: (h, b, 0, 0))
    block = (None, shape[1], None, shape[3])
    return pl.BlockSpec(block, lambda i, h, b: (b, 0, h, 0))


def try_out(call: Call) -> None:
    """Runs the kernels on the first GPU here, one row and one head; raises if wrong.

    Compared with `xla` and not only compiled: Triton versions differ in what they
    fetch early, and a kernel that reads a tile before it is written would train on,
    badly. In a thread of its own: what is being traced around this call, its mesh above
    all, is none of its business. Where the GPU that is compiled for is not here,
    nothing can be asked.
    """
    if jax.default_backend() != "gpu":
        return
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(compare, call).result()


def compare(call: Call) -> None:
    """Values and gradients of both on random numbers; ValueError where they differ."""
    random = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(random.normal(size=shape), call.dtype)

    arrays = {
        "qu": array(1, call.T, 1, call.K) / call.K**0.5,
        "k": array(1, call.S, 1, call.K),
        "v": array(1, call.S, 1, call.V),
    }
    if call.R is not None:
        arrays["qw"] = array(1, call.T, 1, call.R) / call.R**0.5
        arrays["r"] = array(call.S, 1, call.R)
    start = seeds = None
    if call.starts:
        # Half of the memory, then a reset in the middle of the segment.
        start = np.full((1, call.T), call.M // 2, np.int32)
        start[:, call.T // 2 :] = call.M + call.T // 2
    if call.rate:
        # Any two words: both implementations drop by the same hash.
        seeds = jnp.asarray([[[7, 11]]], jnp.int32)
    # With weights of 1 all queries would hand back the same gradient, and a mistaken
    # row would not show.
    weights = array(1, call.T, 1, call.V)

    def run(implementation, arrays):
        y = implementation(
            arrays["qu"],
            arrays.get("qw"),
            arrays["k"],
            arrays["v"],
            arrays.get("r"),
            dataclasses.replace(call.visibility, key_start_BT=start),
            dropout_rate=call.rate,
            seeds_BH2=seeds,
        )
        return (y * weights).astype(jnp.float32).sum(), y

    found, expected = (
        jax.jit(jax.grad(functools.partial(run, function), has_aux=True))(arrays)
        for function in (attention, xla.attention)
    )
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found),
        jax.tree.leaves(expected),
        strict=True,
    ):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        off = np.abs(a - b).max() / np.abs(b).max()
        # Written so that NaN is an error too.
        if not off < TOLERANCE:
            where = "values" if path[0].idx else f"gradient of {path[-1].key}"
            raise ValueError(f"{where} differ by {off:.1%} from those of 'xla'")
