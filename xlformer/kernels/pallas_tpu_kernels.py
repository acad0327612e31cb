"""The two kernels of pallas_tpu.py: what happens to one tile of queries and keys.

Flash attention (Dao et al. 2022, arXiv:2205.14135) with the relative term inside. The
rows of r lie in the order of the keys: row c is that of distance d = Tp + M - c (Tp and
Sp are T and S, rounded up to tiles). The tile of queries from i0 and keys from j0 wants
the Q + N rows from c0 = Tp - Q - i0 + j0 on, and its own score (i, j) of the product
`raw` = qw . rows stands in column j - i + Q: a shift that grows by one each row, which
the TPU's strided rotation does in one go.

The next tile of keys wants rows N further on, of which Q are those that this tile had
last: they are kept, so that each tile multiplies N new rows only.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xlformer.kernels.dropout import keep_pairs

# Finite: the difference of two hidden scores is 0, that of two infinities NaN.
HIDDEN = -1e30
LANES = 128  # the width of a TPU's register


class _Tile:
    """Where a grid step (head, row, tile of queries, tile of keys) is."""

    def __init__(self, first_ref, seeds_ref, x, tiles):
        self.tiles, self.call = tiles, tiles.call
        self.x, self.seeds_ref = x, seeds_ref
        self.h, self.b, self.q, self.n = (pl.program_id(axis) for axis in range(4))
        self.B, self.Q, self.N = pl.num_programs(1), tiles.Q, tiles.N
        self.i0, self.j0 = self.q * self.Q, self.n * self.N
        self.first = first_ref[self.b * tiles.query_tiles + self.q]
        self.last = tiles.last_tile(self.q)
        # The first row of r that this tile wants: c0 at the top of this file.
        self.row = tiles.Tp - self.Q - self.i0 + self.j0
        self.visited = (self.n >= self.first) & (self.n <= self.last)

    def pairs(self):
        """Indices of the queries and of the keys, [Q, N] each."""
        shape = (self.Q, self.N)
        i = lax.broadcasted_iota(jnp.int32, shape, 0) + self.i0
        return i, lax.broadcasted_iota(jnp.int32, shape, 1) + self.j0

    def distance_rows(self, offset, size):
        # Mosaic loads only from rows that it knows to be aligned.
        aligned = pl.multiple_of(self.row + offset, self.tiles.step)
        return (0, pl.ds(aligned, size), slice(None))

    def scores(self, s):
        """The scores of the tile, and which of them are visible: [Q, N] each."""
        x, Q = self.x, self.Q
        scores = _dot(x["qu"][0, 0], x["k"][0, 0], 1, 1)
        if self.call.R is not None:
            qw, raw = x["qw"][0, 0], s["raw"]

            @pl.when(self.n == self.first)
            def _():
                raw[:, :Q] = _dot(qw, x["r"][self.distance_rows(0, Q)], 1, 1)

            @pl.when(self.n != self.first)
            def _():
                # What the tile before had last: without it the product would be (Q + N)
                # / N times as large, 1.5 times with tiles of 256 and 512.
                raw[:, :Q] = raw[:, self.N :]

            raw[:, Q:] = _dot(qw, x["r"][self.distance_rows(Q, self.N)], 1, 1)
            scores += _skew(raw[...], self.N)
        i, j = self.pairs()
        start = s["start"][:, :1] if self.call.starts else None
        visible = self.call.visibility.allows(i, j, self.call.M, start)
        visible &= j < self.call.S
        return jnp.where(visible, scores, HIDDEN), visible

    def kept(self):
        """What dropout multiplies each probability by."""
        at = 2 * (self.b * pl.num_programs(0) + self.h)
        keep = keep_pairs(
            self.seeds_ref[at], self.seeds_ref[at + 1], *self.pairs(), self.call.rate
        )
        return jnp.where(keep, 1 / (1 - self.call.rate), 0.0)

    def load_starts(self, s):
        if self.call.starts:
            s["start"][...] = _column(self.x["start"][0])


def forward(first_ref, seeds_ref, x, y, s, *, tiles):
    """Writes o, and the logarithm of each softmax's sum as `lse`."""
    tile = _Tile(first_ref, seeds_ref, x, tiles)

    @pl.when(tile.n == tile.first)
    def _():
        s["max"][...] = jnp.full_like(s["max"], HIDDEN)
        s["sum"][...] = jnp.zeros_like(s["sum"])
        s["o"][...] = jnp.zeros_like(s["o"])
        tile.load_starts(s)

    @pl.when(tile.visited)
    def _():
        scores, visible = tile.scores(s)
        before = s["max"][:, :1]
        after = jnp.maximum(before, scores.max(1, keepdims=True))
        p = jnp.where(visible, jnp.exp(scores - after), 0.0)
        shrink = jnp.exp(before - after)
        total = s["sum"][:, :1] * shrink + p.sum(1, keepdims=True)
        s["max"][...] = jnp.broadcast_to(after, s["max"].shape)
        s["sum"][...] = jnp.broadcast_to(total, s["sum"].shape)
        if tiles.call.rate:
            p *= tile.kept()
        v = x["v"][0, 0]
        s["o"][...] = s["o"][...] * shrink + _dot(p.astype(v.dtype), v, 1, 0)

    @pl.when(tile.n == pl.num_programs(3) - 1)
    def _():
        total = s["sum"][...]
        # A query of the padding may have seen no key: its sum is not divided by.
        total = jnp.where(total == 0.0, 1.0, total)
        y["o"][0, 0] = (s["o"][...] / total[:, :1]).astype(y["o"].dtype)
        y["lse"][0, 0] = jnp.transpose(s["max"][...] + jnp.log(total))[:1]


def backward(first_ref, seeds_ref, x, y, s, *, tiles):
    """Writes all gradients in one pass: those of k, v and r pile up on the chip."""
    tile = _Tile(first_ref, seeds_ref, x, tiles)
    begins = (tile.q == 0) & (tile.n == 0)
    relative = tiles.call.R is not None

    @pl.when(begins)
    def _():
        s["dk"][...] = jnp.zeros_like(s["dk"])
        s["dv"][...] = jnp.zeros_like(s["dv"])

    if relative:
        # The grid runs over the rows of a head: its dr begins with the first of them.
        @pl.when(begins & (tile.b == 0))
        def _():
            y["dr"][...] = jnp.zeros_like(y["dr"])

    @pl.when(tile.n == tile.first)
    def _():
        s["dqu"][...] = jnp.zeros_like(s["dqu"])
        if relative:
            s["dqw"][...] = jnp.zeros_like(s["dqw"])
            s["rest"][...] = jnp.zeros_like(s["rest"])
        tile.load_starts(s)
        s["lse"][...] = _column(x["lse"][0, 0])
        # Sum over keys of p times its gradient, which is o . do.
        products = x["o"][0, 0].astype(jnp.float32) * x["do"][0, 0].astype(jnp.float32)
        delta = products.sum(1, keepdims=True)
        s["delta"][...] = jnp.broadcast_to(delta, s["delta"].shape)

    @pl.when(tile.visited)
    def _():
        qu, k, v, do = (x[name][0, 0] for name in ("qu", "k", "v", "do"))
        scores, visible = tile.scores(s)
        p = jnp.where(visible, jnp.exp(scores - s["lse"][:, :1]), 0.0)
        dp = _dot(do, v, 1, 1)
        kept_p = p
        if tiles.call.rate:
            kept = tile.kept()
            kept_p, dp = p * kept, dp * kept
        dscores = p * (dp - s["delta"][:, :1])
        keys = pl.ds(pl.multiple_of(tile.j0, tiles.N), tiles.N)
        s["dv"][keys, :] += _dot(kept_p.astype(do.dtype), do, 0, 0)
        low = dscores.astype(k.dtype)
        s["dk"][keys, :] += _dot(low, qu, 0, 0)
        s["dqu"][...] += _dot(low, k, 1, 0)
        if relative:
            _position_gradients(tile, dscores, y, s)

    @pl.when(tile.n == pl.num_programs(3) - 1)
    def _():
        y["dqu"][0, 0] = s["dqu"][...].astype(y["dqu"].dtype)
        if relative:
            y["dqw"][0, 0] = s["dqw"][...].astype(y["dqw"].dtype)

    @pl.when((tile.q == tiles.query_tiles - 1) & (tile.n == pl.num_programs(3) - 1))
    def _():
        y["dk"][0, 0] = s["dk"][...].astype(y["dk"].dtype)
        y["dv"][0, 0] = s["dv"][...].astype(y["dv"].dtype)


def _position_gradients(tile, dscores, y, s):
    """The way back of the shift; its last Q columns belong to the next tile's rows."""
    Q, N, x = tile.Q, tile.N, tile.x
    qw = x["qw"][0, 0]
    draw = _unskew(dscores, Q)
    now = draw[:, :N]
    rest = [now[:, Q:]] if Q < N else []  # Mosaic has no empty arrays.
    now = jnp.concatenate([now[:, :Q] + s["rest"][...], *rest], axis=1)
    s["rest"][...] = draw[:, N:]

    def add(offset, draw):
        rows, draw = tile.distance_rows(offset, draw.shape[1]), draw.astype(qw.dtype)
        s["dqw"][...] += _dot(draw, x["r"][rows], 1, 0)
        y["dr"][rows] += _dot(draw, qw, 0, 0)

    add(0, now)

    @pl.when(tile.n == tile.last)
    def _():
        # The last tile has no next one, and its rest may still hold distance 0.
        add(N, s["rest"][...])


def _skew(raw, N):
    """[Q, Q + N] -> [Q, N]: out[i, j] = raw[i, j - i + Q]."""
    # From v5e on: a v4 has no strided rotation at all.
    return pltpu.roll(raw, N, 1, stride=1, stride_axis=0)[:, :N]


def _unskew(x, Q):
    """[Q, N] -> [Q, Q + N]: out[i, c] = x[i, c + i - Q], 0 outside.

    A rotation by Q - i. Mosaic refuses strides as large as -1 needs (Q + N - 1), so
    the low 3 bits of i are 3 masked rotations, the others one for each group of 8.
    """
    x = jnp.concatenate([x, jnp.zeros((x.shape[0], Q), x.dtype)], axis=1)
    width = x.shape[1]
    i = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for bit in range(3):
        moved = pltpu.roll(x, width - (1 << bit), 1)
        x = jnp.where((i >> bit) & 1 == 1, moved, x)
    groups = [
        pltpu.roll(x[start : start + 8], (Q - start) % width, 1)
        for start in range(0, Q, 8)
    ]
    return jnp.concatenate(groups, axis=0)


def _column(row):
    """Turns [1, Q], one number a query, into a column that stands in every lane."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


def _dot(a, b, axis_a, axis_b):
    contract = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)
