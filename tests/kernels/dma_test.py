"""Bytes that kernels copy themselves, against a walk over the grid, step by step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from xlformer.kernels import dma, pallas_tpu
from xlformer.kernels import pallas_tpu_tiles as tiles
from xlformer.kernels.pallas_tpu_case import Tiles


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def walked(grid, specs, arrays, scalars=()):
    """The same, as the machine does it: one block of each array is there at a time."""
    found, there = dict.fromkeys(specs, 0), {}
    for at in itertools.product(*map(range, grid)):
        for name, spec in specs.items():
            block = tuple(int(i) for i in spec.index_map(*at, *scalars))
            if there.get(name) != block:
                there[name] = block
                whole = np.zeros(arrays[name].shape, arrays[name].dtype)
                parts = zip(block, spec.block_shape, strict=True)
                found[name] += whole[
                    tuple(slice(i * n, (i + 1) * n) for i, n in parts)
                ].nbytes
    return found


def test_a_block_is_copied_when_the_grid_comes_to_it():
    specs = {
        "rows": pl.BlockSpec((2, 8), lambda i, j: (i, 0)),
        "again": pl.BlockSpec((2, 8), lambda i, j: (j, 0)),
        "whole": pl.BlockSpec((6, 8), lambda i, j: (0, 0)),
        "ragged": pl.BlockSpec((4, 8), lambda i, j: (j, 0)),
    }
    arrays = dict.fromkeys(specs, shape(6, 8)) | {"ragged": shape(9, 8)}
    found = dma.copied_bytes((2, 3), specs, arrays)
    row = 4 * 8
    assert found == walked((2, 3), specs, arrays)
    assert found == {
        "rows": 4 * row,  # stays while j moves
        "again": 12 * row,
        "whole": 6 * row,
        "ragged": 18 * row,  # 4 + 4 + 1, twice: the last block is not whole
    }


def case_of(*, B=2, H=2, T=37, M=20, K=8, starts=False, window=None, dtype="float32"):
    S = M + T
    arrays = [shape(B, n, H, K, dtype=dtype) for n in (T, S, S)]
    return Tiles.of(
        *(*arrays, shape(S, H, K, dtype=dtype)),
        key_start_BT=arrays if starts else None,
        window=window,
        causal=True,
        rate=0.0,
    )


@pytest.fixture
def tiny(monkeypatch):
    """Tiles of 8 queries and 16 keys, as the interpreter's tests use."""
    monkeypatch.setattr("xlformer.kernels.case._TEST_TILES", (8, 16))


@pytest.mark.parametrize(
    "options", [{}, {"window": 9}, {"starts": True}, {"starts": True, "window": 30}]
)
def test_both_kernels_copy_what_a_walk_over_their_grids_finds(options, tiny):
    case, rows, heads = case_of(**options), 2, 2
    start_BT = np.zeros((rows, case.T), np.int32)
    start_BT[0, 11:], start_BT[1] = case.M + 11, 13
    start_BT = start_BT if case.starts else None
    found = pallas_tpu.copied_bytes(case, rows=rows, heads=heads, start_BT=start_BT)
    arguments = pallas_tpu._arguments(case, rows, heads)
    x, _, _ = jax.eval_shape(lambda a: pallas_tpu._inputs(case, a), arguments)
    first = case.first_tiles(None if start_BT is None else jnp.asarray(start_BT))
    first = np.broadcast_to(first, (rows, case.query_tiles)).ravel()
    for name, kernel in (("forward", tiles.forward), ("backward", tiles.backward)):
        grid, out, blocks = pallas_tpu._layout(kernel, case, x)
        by_array = walked(grid, blocks, {**x, **out}, (first, None))
        assert found[name] == sum(by_array.values())
        x = {**x, **out, "do": out.get("o")}


def test_tiles_out_of_sight_are_not_copied(tiny):
    """No key beyond the last query's own tile, none before the window or the start."""
    whole = case_of(T=64, M=0)  # 8 tiles of queries, 4 of keys
    x, _, _ = jax.eval_shape(
        lambda a: pallas_tpu._inputs(whole, a), pallas_tpu._arguments(whole, 1, 1)
    )

    def tiles_of_keys(case, start_BT=None):
        grid, out, blocks = pallas_tpu._layout(tiles.forward, case, x)
        first = case.first_tiles(start_BT).ravel()
        specs = {"k": blocks["k"]}
        found = dma.copied_bytes(grid, specs, {**x, **out}, scalars=(first, None))
        return found["k"] / (16 * 8 * 4)

    # Tiles of queries see 1, 1, 2, 2, ... of keys; the last one that was there stays.
    assert tiles_of_keys(whole) == 1 + 0 + 1 + 2 + 3 + 3 + 4 + 4
    assert tiles_of_keys(case_of(T=64, M=0, window=0)) == 4
    start_BT = jnp.full((1, 64), 63, jnp.int32)
    late = case_of(T=64, M=0, starts=True)
    assert tiles_of_keys(late, jnp.minimum(start_BT, jnp.arange(64)[None])) == 4


def test_the_published_shape_of_enwik8():
    """B 8, H 8, T = M = 512, D 64 in bfloat16, counted by hand."""
    case = case_of(B=8, H=8, T=512, M=512, K=64, dtype="bfloat16")
    assert (case.Q, case.N) == (256, 512)
    found = pallas_tpu.copied_bytes(case, rows=8, heads=8)
    one = 8 * 8 * 512 * 64 * 2  # bytes of 512 positions of all rows and heads
    table, lse = 8 * (512 + 1024) * 64 * 2, 8 * 8 * 512 * 4
    keys = 2 * 4 * one  # k and v, both tiles for each of the two tiles of queries
    assert found["forward"] == 2 * one + keys + table + one + lse
    gradients = 2 * one + 2 * 2 * one + 2 * table  # of queries, keys, the table
    assert found["backward"] == 4 * one + keys + table + lse + gradients
    assert round(found["forward"] / 1e6, 1) == 47.8
    assert round(found["backward"] / 1e6, 1) == 80.3
