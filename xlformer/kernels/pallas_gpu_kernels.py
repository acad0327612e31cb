"""The three kernels of pallas_gpu.py, in what Triton can say.

Flash attention (Dao et al. 2022, arXiv:2205.14135) with the relative term inside. A
tile of Q queries from i0 on meets the keys in tiles of N. Its product `raw` = qw . r
has a column for each distance, ascending like the keys: score (i, j) of a tile stands
in column g = j - i + Q - 1, counted from the tile's own first one. So a tile of keys
wants columns of two tiles of raw, this one and the next: one new product each.

Triton's arrays can be neither sliced nor rotated, but loads may have any indices. Each
program therefore writes its tiles of raw in turns into two places of a ring in global
memory (32 KiB, which stay in the L2 cache), and reads them back shifted.

The gradients of the scores go the same way back: written shifted into a [T, columns]
array, read again straight for the gradient of qw, and later whole for that of r.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from xlformer.kernels.dropout import keep_pairs
from xlformer.kernels.pallas_gpu_tiles import GPUTiles, padded

# Finite: the difference of two hidden scores is 0, that of two infinities NaN.
HIDDEN = -1e30


class _Queries:
    """The tile of queries that a program (tile, head, row) works on."""

    def __init__(self, x, ring, tiles: GPUTiles):
        self.x, self.ring, self.tiles, self.call = x, ring, tiles, tiles.call
        self.Q, self.N = tiles.Q, tiles.N
        number = pl.program_id(0)
        self.i0 = number * self.Q
        self.i = jnp.arange(self.Q, dtype=jnp.int32) + self.i0
        self.first, self.last = x["first"][number], tiles.last_tile(number)
        self.qu = rows(x["qu"], self.i)
        if self.call.R is not None:
            self.qw = rows(x["qw"], self.i)
        if self.call.starts:
            # The last tile has queries past the last one; an index out of an array
            # would read what lies behind it.
            seen = self.i < self.call.T
            self.start = plgpu.load(x["start"].at[self.i], mask=seen, other=0)

    def keys(self, n):
        return jnp.arange(self.N, dtype=jnp.int32) + n * self.N

    def pairs(self, n):
        shape = (self.Q, self.N)
        i = lax.broadcast_in_dim(self.i, shape, (0,))
        return i, lax.broadcast_in_dim(self.keys(n), shape, (1,))

    def distances(self, n):
        """The rows of r for tile n of raw."""
        most = self.i0 + self.call.M + self.Q - 1
        d = most - self.keys(n)
        return rows(self.x["r"], d)

    def push(self, n):
        """Computes tile n of raw and writes it to its place in the ring."""
        if self.call.R is None:
            return
        raw = dot(self.qw, self.distances(n), 1, 1)
        i = lax.broadcasted_iota(jnp.int32, raw.shape, 0)
        # Tiles of raw take the two places in turns: the older of the two is not needed
        # any more.
        column = lax.broadcasted_iota(jnp.int32, raw.shape, 1) + n % 2 * self.N
        plgpu.store(self.ring.at[i, column], raw)

    def scores(self, n, k):
        """The scores against tile n of keys, and which are visible: [Q, N] each."""
        i, j = self.pairs(n)
        scores = dot(self.qu, k, 1, 1)
        if self.call.R is not None:
            # Tile n of raw is there from the step before. Between writing and reading,
            # and again before the next step overwrites what others may still read, all
            # threads of the program wait for each other.
            self.push(n + 1)
            barrier(self.call)
            own = i - self.i0
            # 2 N is a power of 2, so & gives the remainder, of negative numbers too.
            column = (j - own + self.Q - 1) & (2 * self.N - 1)
            # Volatile, so that no compiler fetches it before it is written.
            scores += plgpu.load(self.ring.at[own, column], volatile=True)
            barrier(self.call)
        start = None
        if self.call.starts:
            start = lax.broadcast_in_dim(self.start, i.shape, (0,))
        visible = self.call.visibility.allows(i, j, self.call.M, start)
        visible &= i < self.call.T
        return jnp.where(visible, scores, HIDDEN), visible

    def kept(self, n):
        """What dropout multiplies each probability by."""
        a, b = self.x["seeds"][0], self.x["seeds"][1]
        keep = keep_pairs(a, b, *self.pairs(n), self.call.rate)
        return jnp.where(keep, 1 / (1 - self.call.rate), 0.0)


def forward(x, y, *, tiles: GPUTiles):
    """Writes o, and the logarithm of each softmax's sum as `lse`."""
    call, V = tiles.call, padded(tiles.call.V)
    tile = _Queries(x, y.get("ring"), tiles)
    # Each step makes the next tile of raw; only the first needs its own as well.
    tile.push(tile.first)

    def step(n, carry):
        # The online softmax: the largest score so far, the sum and the output relative
        # to it.
        before, total, o = carry
        k = rows(x["k"], tile.keys(n))
        v = rows(x["v"], tile.keys(n))
        scores, visible = tile.scores(n, k)
        after = jnp.maximum(before, scores.max(1))
        p = jnp.where(visible, jnp.exp(scores - after[:, None]), 0.0)
        shrink = jnp.exp(before - after)
        total = total * shrink + p.sum(1)
        if call.rate:
            p *= tile.kept(n)
        o = o * shrink[:, None] + dot(p.astype(v.dtype), v, 1, 0)
        return after, total, o

    nothing = (
        jnp.full((tiles.Q,), HIDDEN, jnp.float32),
        jnp.zeros((tiles.Q,), jnp.float32),
        jnp.zeros((tiles.Q, V), jnp.float32),
    )
    most, total, o = lax.fori_loop(tile.first, tile.last + 1, step, nothing)
    # A query past the last has seen no key: its sum is 0, and is not divided by.
    total = jnp.where(total == 0.0, 1.0, total)
    store_rows(y["o"], o / total[:, None], tile.i)
    log_sum = most + jnp.log(total)
    plgpu.store(y["lse"].at[tile.i], log_sum, mask=tile.i < call.T)


def backward_queries(x, y, *, tiles: GPUTiles):
    """Writes the gradients of qu and qw, and what the others are made of.

    That is p after dropout, and the gradients of the scores.
    """
    call = tiles.call
    tile = _Queries(x, y.get("ring"), tiles)
    do = rows(x["do"], tile.i)
    o = rows(x["o"], tile.i)
    # Sum over keys of p times its gradient, which is o . do: no pass over the keys.
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(1)
    log_sum = plgpu.load(x["lse"].at[tile.i], mask=tile.i < call.T, other=0.0)
    if call.R is not None:
        # The array comes uninitialised, and the product for r reads all of its columns.
        _clear(tile, y["dscores"])
    tile.push(tile.first)

    def step(n, dqu):
        k = rows(x["k"], tile.keys(n))
        v = rows(x["v"], tile.keys(n))
        scores, visible = tile.scores(n, k)
        p = jnp.where(visible, jnp.exp(scores - log_sum[:, None]), 0.0)
        dp = dot(do, v, 1, 1)
        kept_p = p
        if call.rate:
            kept = tile.kept(n)
            kept_p, dp = p * kept, dp * kept
        # p before dropout and dp after it: dropout is applied to the probabilities, and
        # delta, made of o, has it already.
        dscores = (p * (dp - delta[:, None])).astype(k.dtype)
        i, j = tile.pairs(n)
        # Hidden pairs are written as well, as zeros: backward_keys reads whole tiles.
        inside = (i < call.T) & (j < call.S)
        plgpu.store(y["p"].at[i, j], kept_p.astype(y["p"].dtype), mask=inside)
        _store_shifted(y["dscores"], dscores, i, j, tiles)
        return dqu + dot(dscores, k, 1, 0)

    dqu = jnp.zeros((tiles.Q, padded(call.K)), jnp.float32)
    dqu = lax.fori_loop(tile.first, tile.last + 1, step, dqu)
    store_rows(y["dqu"], dqu, tile.i)
    if call.R is not None:
        barrier(call)
        dqw = _position_gradient(tile, y["dscores"])
        store_rows(y["dqw"], dqw, tile.i)


def _store_shifted(array, dscores, i, j, tiles):
    """Writes each to the column of its distance; there is none for keys ahead."""
    column = tiles.first_column(0) + tiles.Q - 1 - i + j
    inside = (i < tiles.call.T) & (column < tiles.columns)
    plgpu.store(array.at[i, column], dscores, mask=inside)


def _position_gradient(tile, array):
    """The gradient of qw, in a loop of its own, where nothing is written.

    In the loop that writes, Triton would load a tile ahead, which is not there yet.
    """
    tiles = tile.tiles

    def step(n, dqw):
        i, j = tile.pairs(n)
        column = tiles.first_column(tile.i0) + j
        inside = (i < tiles.call.T) & (column < tiles.columns)
        draw = plgpu.load(array.at[i, column], mask=inside, other=0)
        return dqw + dot(draw, tile.distances(n), 1, 0)

    dqw = jnp.zeros((tiles.Q, padded(tiles.call.R)), jnp.float32)
    # One tile more than keys: their columns reach into the next tile of raw.
    return lax.fori_loop(tile.first, tile.last + 2, step, dqw)


def _clear(tile, array):
    """Zeroes the columns up to the first that all queries of the tile will write."""
    tiles = tile.tiles
    end = tiles.first_column(tile.i0) + tile.first * tiles.N + tiles.Q
    zeros = jnp.zeros((tiles.Q, tiles.N), array.dtype)

    def step(n, _):
        i, column = tile.pairs(n)
        inside = (i < tiles.call.T) & (column < tiles.columns)
        plgpu.store(array.at[i, column], zeros, mask=inside)

    lax.fori_loop(0, (end + tiles.N - 1) // tiles.N, step, None)
    barrier(tiles.call)


def backward_keys(x, y, *, tiles: GPUTiles):
    """Writes the gradients of a tile of k and of v, from what backward_queries left."""
    call = tiles.call
    n = pl.program_id(0)
    j = jnp.arange(tiles.N, dtype=jnp.int32) + n * tiles.N
    pairs = (tiles.Q, tiles.N)
    j_QN = lax.broadcast_in_dim(j, pairs, (1,))

    def step(tile, carry):
        dk, dv = carry
        i = jnp.arange(tiles.Q, dtype=jnp.int32) + tile * tiles.Q
        i_QN = lax.broadcast_in_dim(i, pairs, (0,))
        # A pair of tiles that backward_queries did not visit holds nothing.
        visited = (x["first"][tile] <= n) & (n <= tiles.last_tile(tile))
        inside = (i_QN < call.T) & (j_QN < call.S) & visited
        p = plgpu.load(x["p"].at[i_QN, j_QN], mask=inside, other=0)
        column = tiles.first_column(0) + tiles.Q - 1 - i_QN + j_QN
        inside &= column < tiles.columns
        dscores = plgpu.load(x["dscores"].at[i_QN, column], mask=inside, other=0)
        qu = rows(x["qu"], i)
        do = rows(x["do"], i)
        return dk + dot(dscores, qu, 0, 0), dv + dot(p, do, 0, 0)

    dk = jnp.zeros((tiles.N, padded(call.K)), jnp.float32)
    dv = jnp.zeros((tiles.N, padded(call.V)), jnp.float32)
    dk, dv = lax.fori_loop(*tiles.query_range(n), step, (dk, dv))
    store_rows(y["dk"], dk, j)
    store_rows(y["dv"], dv, j)


# What all of them do ------------------------------------------------------------------


def rows(array, indices):
    """Rows of an array, padded with zeros to a power of 2; those outside are zeros."""
    row, column, inside = _at(array, indices)
    return plgpu.load(array.at[row, column], mask=inside & (row >= 0), other=0)


def store_rows(array, values, indices):
    row, column, inside = _at(array, indices)
    plgpu.store(array.at[row, column], values.astype(array.dtype), mask=inside)


def _at(array, indices):
    # Triton knows only arrays whose sizes are powers of 2: masks hide the rest.
    count, width = array.shape
    shape = (indices.shape[0], padded(width))
    row = lax.broadcast_in_dim(indices, shape, (0,))
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    return row, column, (row < count) & (column < width)


def barrier(call):
    """Makes all threads of the program write before any of them reads."""
    # Interpreted there is one thread, and JAX has no such operation for a CPU.
    if not call.interpret:
        plgpu.debug_barrier()


def dot(a, b, axis_a, axis_b):
    contract = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)
