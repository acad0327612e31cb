"""Tokens sorted by bucket in several rounds, and cut into chunks that form a ring.

Of T tokens in each of R rounds, I = R T stand one after another in G chunks of C slots,
the last of which is filled up. A query sees the keys of its own chunk and of chunks
beside it; before the first stands the last.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Ring:
    """G chunks of C slots, and which of the I = R T tokens of all rounds stands where.

    Attributes:
      order_BHI: the tokens, sorted.
      back_BHI: where each of them stands.
      bucket_BHRT: of each.
      real_BRT: which of them may be seen; None is all.
      chunks_B: of a row whose ring is shorter than G.
      short_B: whether a row has no more than C tokens, which are in one chunk.
      C: slots of a chunk.
      shifts: which chunks a query sees, relative to its own.
    """

    order_BHI: jax.Array
    back_BHI: jax.Array
    bucket_BHRT: jax.Array
    real_BRT: jax.Array | None
    chunks_B: jax.Array | None
    short_B: jax.Array | None
    C: int
    shifts: tuple[int, ...]

    @classmethod
    def of(cls, bucket_BHRT, C: int, shifts, valid_BT=None, compact=True) -> Ring:
        """The ring of tokens with these buckets, and its padding.

        compact: whether padding stands behind all rounds, and the ring of a row is that
          of its tokens alone. Otherwise it takes places among them, in its buckets.
        """
        B, H, R, T = bucket_BHRT.shape
        real_BRT = chunks_B = short_B = None
        by_BHRT = bucket_BHRT
        if valid_BT is not None:
            real_BRT = jnp.broadcast_to(valid_BT[:, None], (B, R, T))
        if valid_BT is not None and compact:
            short_B = valid_BT.sum(1) <= C
            real_BRT &= ~short_B[:, None, None] | (jnp.arange(R) == 0)[None, :, None]
            chunks_B = jnp.maximum(-(-real_BRT.sum((1, 2)) // C), 1)
            bucket_BHRT = jnp.where(short_B[:, None, None, None], 0, bucket_BHRT)
            last = jnp.iinfo(bucket_BHRT.dtype).max
            by_BHRT = jnp.where(real_BRT[:, None], bucket_BHRT, last)
        order_BHI = jnp.argsort(by_BHRT.reshape(B, H, R * T), stable=True)
        back_BHI = jnp.argsort(order_BHI)
        shifts = tuple(shifts)
        return cls(
            order_BHI, back_BHI, bucket_BHRT, real_BRT, chunks_B, short_B, C, shifts
        )

    @property
    def G(self) -> int:
        return math.ceil(self.order_BHI.shape[2] / self.C)

    def sorted(self, x_BHTK) -> jax.Array:
        """One of each token in each round, [B, H, G, C, K], zeros behind the last."""
        R = self.bucket_BHRT.shape[2]
        x_BHIK = jnp.tile(x_BHTK, (1, 1, R, 1))
        return self._cut(_permuted(x_BHIK, self.order_BHI, self.back_BHI), 0)

    def unsorted(self, y_BHGCK) -> jax.Array:
        """What each token has in each round, [B, H, R, T, K]."""
        B, H, *_, K = y_BHGCK.shape
        y_BHIK = y_BHGCK.reshape(B, H, -1, K)[:, :, : self.order_BHI.shape[2]]
        y_BHIK = _permuted(y_BHIK, self.back_BHI, self.order_BHI)
        return y_BHIK.reshape(*self.bucket_BHRT.shape, K)

    def _cut(self, x_BHIK, fill) -> jax.Array:
        B, H, *_ = x_BHIK.shape
        more = x_BHIK.shape[3:]
        widths = [(0, 0)] * x_BHIK.ndim
        widths[2] = 0, self.G * self.C - x_BHIK.shape[2]
        x = jnp.pad(x_BHIK, widths, constant_values=fill)
        return x.reshape(B, H, self.G, self.C, *more)

    def shift(self, s: int):
        """Chunks from a query's own to one it sees, and how many make the ring."""
        # As slices have it in the programs: in a ring of 2, 3 chunks back is no shift.
        if self.chunks_B is None:
            return (s if abs(s) < self.G else 0), self.G
        return jnp.where(abs(s) < self.chunks_B, s, 0), self.chunks_B

    def seen(self, x_BHGCK) -> jax.Array:
        """What the queries of each chunk see, [B, H, G, S, K]."""
        parts = []
        for s, chunks in map(self.shift, self.shifts):
            if self.chunks_B is None:
                parts.append(jnp.roll(x_BHGCK, -s, 2))
                continue
            index_BG = (jnp.arange(self.G)[None] + s[:, None]) % chunks[:, None]
            parts.append(jax.vmap(lambda x, i_G: x[:, i_G])(x_BHGCK, index_BG))
        return jnp.concatenate(parts, 3)

    def pairs(self, x_BHRT, fill=0):
        """x of the queries, [B, H, G, C, 1], and of their keys, [B, H, G, 1, S].

        B, H and R of x may be 1.
        """
        x_BHRT = jnp.broadcast_to(x_BHRT, self.bucket_BHRT.shape)
        x_BHI = jnp.take_along_axis(
            x_BHRT.reshape(self.order_BHI.shape),
            self.order_BHI,
            2,
            mode="promise_in_bounds",
        )
        x_BHGC = self._cut(x_BHI, fill)
        return x_BHGC[..., None], self.seen(x_BHGC)[:, :, :, None]

    def meetings(self, same_bucket: bool) -> jax.Array:
        """In how many rounds a key is where its query looks, [B, H, G, C, S].

        same_bucket: whether it must be in the query's bucket there too.
        """
        chunk_BHRT = (self.back_BHI // self.C).reshape(self.bucket_BHRT.shape)
        count = 0
        for r in range(chunk_BHRT.shape[2]):
            query, key = self.pairs(chunk_BHRT[:, :, r, None])
            counts = True
            if same_bucket:
                own, other = self.pairs(self.bucket_BHRT[:, :, r, None])
                counts = own == other
            for s, chunks in map(self.shift, self.shifts):
                if self.chunks_B is not None:
                    s, chunks = (x[:, None, None, None, None] for x in (s, chunks))
                count += ((query + s) % chunks == key) & counts
        if self.short_B is not None:
            count = jnp.where(self.short_B[:, None, None, None, None], 1, count)
        return count


@jax.custom_vjp
def _permuted(x_BHIK, order_BHI, back_BHI):
    """x in another order. Its gradient is put back, and not scattered."""
    return jnp.take_along_axis(
        x_BHIK, order_BHI[..., None], 2, mode="promise_in_bounds"
    )


def _permuted_forward(x_BHIK, order_BHI, back_BHI):
    return _permuted(x_BHIK, order_BHI, back_BHI), (order_BHI, back_BHI)


def _permuted_backward(saved, d_BHIK):
    order_BHI, back_BHI = saved
    return _permuted(d_BHIK, back_BHI, order_BHI), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
