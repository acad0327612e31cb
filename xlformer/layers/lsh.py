"""Attention among tokens of like hashes (Reformer: Kitaev et al. 2020, 2001.04451).

One vector of a token is its query and, at unit length, its key. In each of R rounds a
token's bucket is argmax [x W; -x W] of a random W; tokens are sorted by (bucket,
position). The rounds, one after another, are cut into chunks of C, the last one filled
up. A query sees the keys of its chunk and of neighbouring ones, in a ring: before the
first chunk stands the last. A token sees itself only where it sees nothing else. What
the rounds find is weighed by how much each has found, exp(logsumexp of its scores).

What is causal: a query gives no weight to a later token, and no gradient flows back
from it, since buckets are constants. But all tokens are sorted, and which earlier ones
share a query's chunk depends on the buckets of later ones: if a later token falls into
another bucket, outputs before it change, here as in the programs of the paper's authors
and their followers. They do not change by what it holds in the bucket where it is, nor
where all chunks see each other. The same holds of padding, which lies behind all others
in each round, and of tokens that a reset hides.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

# How scores are scaled. UNIT: unit keys (the authors, Hugging Face); UNIT_SCALED: by
# another 1/sqrt(K) (reformer-pytorch).
UNIT, UNIT_SCALED = "unit", "unit_scaled"
# The score of a token with itself: far below all others, far above what is hidden.
SELF = -1e5


@dataclasses.dataclass(frozen=True)
class Lsh:
    """What is done with the buckets.

    Attributes:
      chunk_length: C. T <= C tokens attend to each other without hashing.
      causal: whether later tokens are hidden.
      before, after: how many neighbouring chunks a query sees. Of a chunk that comes
        twice, in a ring shorter than that, the keys count twice.
      scaling: UNIT or UNIT_SCALED.
      same_bucket_only: whether only keys of a query's own bucket and round are seen.
      discount_duplicates: whether a pair that meets in n rounds counts 1/n each time.
        As in reformer-pytorch a pair of different rounds, where these touch, that never
        meets in one counts 1e9 times, unless same_bucket_only hides it.
    """

    chunk_length: int
    causal: bool = True
    before: int = 1
    after: int = 0
    scaling: str = UNIT
    same_bucket_only: bool = False
    discount_duplicates: bool = False


def rotations(keys_B, H: int, K: int, rounds: int, buckets, dtype) -> jax.Array:
    """Random W of each row, [B, H, K, R, N], from its key; see `hashed` for buckets."""
    shape = H, K, rounds, sum(_factors(buckets)) // 2
    # Drawn in float32 whatever the dtype, so that all see the same.
    draw = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))
    return draw(keys_B).astype(dtype)


def hashed(qk_BTHK, rotations_BHKRN, buckets=None, valid_BT=None) -> jax.Array:
    """The bucket of each token in each round, [B, H, R, T]; round r counts on from r-1.

    Args:
      rotations_BHKRN: B and H may be 1.
      buckets: how many, an even number; or several, whose product it is: then N is half
        of their sum, which takes less memory. None is 2N.
      valid_BT: padding is put into a last bucket of its own.
    """
    B, _, H, _ = qk_BTHK.shape
    factors = _factors(2 * rotations_BHKRN.shape[-1] if buckets is None else buckets)
    exact = jnp.promote_types(qk_BTHK.dtype, jnp.float32)
    rotations_BHKRN = jnp.broadcast_to(
        rotations_BHKRN, (B, H, *rotations_BHKRN.shape[2:])
    )
    x_BHRTN = jnp.einsum(
        "BTHK,BHKRN->BHRTN",
        lax.stop_gradient(qk_BTHK).astype(exact),
        rotations_BHKRN.astype(exact),
    )
    start, count, bucket_BHRT = 0, 1, 0
    for factor in factors:
        part = x_BHRTN[..., start : start + factor // 2]
        index_BHRT = jnp.argmax(jnp.concatenate([part, -part], -1), -1)
        bucket_BHRT += count * index_BHRT.astype(jnp.int32)
        start, count = start + factor // 2, count * factor
    if valid_BT is not None:
        bucket_BHRT = jnp.where(valid_BT[:, None, None], bucket_BHRT, count)
        count += 1
    return bucket_BHRT + count * jnp.arange(bucket_BHRT.shape[2])[None, None, :, None]


def lsh_attention(
    qk_BTHK,
    v_BTHV,
    rotations_BHKRN,
    lsh: Lsh,
    *,
    buckets=None,
    start_BT=None,
    valid_BT=None,
) -> jax.Array:
    """The attended values [B, T, H, V], for any T.

    Args:
      qk_BTHK: queries, not scaled, and keys, of any length.
      rotations_BHKRN: of R rounds, see `rotations`; B and H may be 1.
      buckets: see `hashed`.
      start_BT: the first position that each query sees; None is 0.
      valid_BT: padding is False, and nobody sees it, whatever it holds. What is
        attended from there means nothing.
    """
    if valid_BT is not None:
        # 0 * NaN is NaN, also in the gradients of what nobody reads.
        qk_BTHK, v_BTHV = (
            jnp.where(valid_BT[:, :, None, None], x, 0) for x in (qk_BTHK, v_BTHV)
        )
    B, T, H, _ = qk_BTHK.shape
    if lsh.chunk_length < T:
        bucket_BHRT = hashed(qk_BTHK, rotations_BHKRN, buckets, valid_BT)
    else:
        bucket_BHRT = jnp.zeros((B, H, 1, T), jnp.int32)
        lsh = Lsh(T, lsh.causal, before=0, after=0, scaling=lsh.scaling)
    return attend(
        qk_BTHK, v_BTHV, bucket_BHRT, lsh, start_BT=start_BT, valid_BT=valid_BT
    )


def attend(qk_BTHK, v_BTHV, bucket_BHRT, lsh: Lsh, *, start_BT=None, valid_BT=None):
    """`lsh_attention` of buckets that are known; everything must be finite.

    Memory is of the order of R T C (1 + before + after) for each head.
    """
    B, T, H, K = qk_BTHK.shape
    ring = _Ring.of(bucket_BHRT, lsh)
    exact = jnp.promote_types(qk_BTHK.dtype, jnp.float32)
    with jax.named_scope("sort"):
        q_BHGCK, v_BHGCV = (
            ring.sorted(jnp.swapaxes(x, 1, 2)) for x in (qk_BTHK, v_BTHV)
        )
        k_BHGSK, v_BHGSV = ring.seen(_unit(q_BHGCK, lsh.scaling)), ring.seen(v_BHGCV)
    with jax.named_scope("scores"):
        score_BHGCS = jnp.einsum(
            "BHGCK,BHGSK->BHGCS", q_BHGCK, k_BHGSK, preferred_element_type=exact
        )
        score_BHGCS = _masked(score_BHGCS, ring, bucket_BHRT, lsh, start_BT, valid_BT)
        top_BHGC1 = lax.stop_gradient(score_BHGCS.max(-1, keepdims=True))
        weight_BHGCS = jnp.exp(score_BHGCS - top_BHGC1)
        sum_BHGC1 = weight_BHGCS.sum(-1, keepdims=True)
    with jax.named_scope("values"):
        y_BHGCV = jnp.einsum(
            "BHGCS,BHGSV->BHGCV",
            weight_BHGCS.astype(v_BHGSV.dtype),
            v_BHGSV,
            preferred_element_type=exact,
        )
    with jax.named_scope("rounds"):
        # Not by logarithms: at a score of SELF these are rounded to 0.008 in float32.
        y_BHRTV, sum_BHRT1, top_BHRT1 = map(
            ring.unsorted, (y_BHGCV, sum_BHGC1, top_BHGC1)
        )
        share_BHRT1 = jnp.exp(top_BHRT1 - top_BHRT1.max(2, keepdims=True))
        total_BHT1 = (share_BHRT1 * sum_BHRT1).sum(2)
        y_BHTV = (share_BHRT1 * y_BHRTV).sum(2) / total_BHT1
        return jnp.swapaxes(y_BHTV, 1, 2).astype(v_BTHV.dtype)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """G chunks of C slots, and which token stands where.

    Attributes:
      order_BHRT: the tokens of each round, sorted.
      back_BHRT: where in its round each token stands.
      C: slots of a chunk.
      shifts: which chunks a query sees, relative to its own.
    """

    order_BHRT: jax.Array
    back_BHRT: jax.Array
    C: int
    shifts: tuple[int, ...]

    @classmethod
    def of(cls, bucket_BHRT, lsh: Lsh) -> _Ring:
        order_BHRT = jnp.argsort(bucket_BHRT, stable=True)
        R, T = bucket_BHRT.shape[2:]
        G = math.ceil(R * T / lsh.chunk_length)
        # As slices do it in the programs: in a ring of 2 chunks, 3 back is no shift.
        shifts = [s if abs(s) < G else 0 for s in range(-lsh.before, lsh.after + 1)]
        return cls(order_BHRT, jnp.argsort(order_BHRT), lsh.chunk_length, tuple(shifts))

    @property
    def shape(self):
        """R, T, G and C."""
        R, T = self.order_BHRT.shape[2:]
        return R, T, math.ceil(R * T / self.C), self.C

    def sorted(self, x_BHTK):
        """One of each token in each round, [B, H, G, C, K], zeros behind the last."""
        x_BHRTK = jnp.repeat(x_BHTK[:, :, None], self.shape[0], axis=2)
        return self._cut(_permuted(x_BHRTK, self.order_BHRT, self.back_BHRT))

    def unsorted(self, y_BHGCK):
        """What each token has in each round, [B, H, R, T, K]."""
        R, T, G, C = self.shape
        B, H, *_, K = y_BHGCK.shape
        y_BHRTK = y_BHGCK.reshape(B, H, G * C, K)[:, :, : R * T].reshape(B, H, R, T, K)
        return _permuted(y_BHRTK, self.back_BHRT, self.order_BHRT)

    def _cut(self, x_BHRTK, fill=0):
        R, T, G, C = self.shape
        B, H, _, _, *more = x_BHRTK.shape
        x = x_BHRTK.reshape(B, H, R * T, *more)
        widths = [(0, 0), (0, 0), (0, G * C - R * T)] + [(0, 0)] * len(more)
        return jnp.pad(x, widths, constant_values=fill).reshape(B, H, G, C, *more)

    def slots(self, x_BHRT, fill):
        """x of each slot's token and round, [B, H, G, C]; H and R of x may be 1."""
        x_BHRT = jnp.broadcast_to(x_BHRT, self.order_BHRT.shape)
        x_BHRT = jnp.take_along_axis(
            x_BHRT, self.order_BHRT, -1, mode="promise_in_bounds"
        )
        return self._cut(x_BHRT, fill)

    def seen(self, x_BHGCK):
        """What the queries of each chunk see, [B, H, G, S, K]."""
        return jnp.concatenate([jnp.roll(x_BHGCK, -s, 2) for s in self.shifts], 3)

    def pairs(self, x_BHRT, fill=0):
        """`slots` as those of the queries [B, H, G, C, 1], of their keys [.., 1, S]."""
        x_BHGC = self.slots(x_BHRT, fill)
        return x_BHGC[..., None], self.seen(x_BHGC)[:, :, :, None]

    def meetings(self, bucket_BHRT):
        """In how many rounds a key is where its query looks, [B, H, G, C, S].

        bucket_BHRT: if given, it must be in the query's bucket there too.
        """
        R, T, G, C = self.shape
        count = 0
        for r in range(R):
            chunk_BHT = (self.back_BHRT[:, :, r] + r * T) // C
            query, key = self.pairs(chunk_BHT[:, :, None])
            same = True
            if bucket_BHRT is not None:
                own, other = self.pairs(bucket_BHRT[:, :, r, None])
                same = own == other
            count += sum(((query + s) % G == key) & same for s in self.shifts)
        return count


def _masked(score_BHGCS, ring, bucket_BHRT, lsh: Lsh, start_BT, valid_BT):
    """Scores of what is hidden become the lowest, of a token with itself SELF."""
    T = bucket_BHRT.shape[-1]
    query, key = ring.pairs(jnp.arange(T)[None, None, None], fill=T)
    sees = key < T
    if lsh.causal:
        sees &= key <= query
    if start_BT is not None:
        sees &= key >= ring.pairs(start_BT[:, None, None])[0]
    if valid_BT is not None:
        sees &= ring.pairs(valid_BT[:, None, None])[1]
    if lsh.same_bucket_only:
        own, other = ring.pairs(bucket_BHRT)
        sees &= own == other
    if lsh.discount_duplicates:
        count = ring.meetings(bucket_BHRT if lsh.same_bucket_only else None)
        score_BHGCS -= jnp.log(count.astype(score_BHGCS.dtype) + 1e-9)
    score_BHGCS = jnp.where(sees, score_BHGCS, jnp.finfo(score_BHGCS.dtype).min)
    return jnp.where(query == key, SELF, score_BHGCS)


def _unit(q_BHGCK, scaling: str):
    """The keys of queries, with what scales the scores."""
    K = q_BHGCK.shape[-1]
    exact = q_BHGCK.astype(jnp.promote_types(q_BHGCK.dtype, jnp.float32))
    square = (exact * exact).sum(-1, keepdims=True)
    # The programs differ also in what keeps a vector of zeros from dividing by 0.
    if scaling == UNIT:
        scale = lax.rsqrt(square + 1e-6 * K)
    else:
        scale = lax.rsqrt(jnp.maximum(square, 1e-24)) / math.sqrt(K)
    return (exact * scale).astype(q_BHGCK.dtype)


@jax.custom_vjp
def _permuted(x_BHRTK, order_BHRT, back_BHRT):
    """x in another order. Its gradient is put back, and not scattered."""
    return jnp.take_along_axis(
        x_BHRTK, order_BHRT[..., None], 3, mode="promise_in_bounds"
    )


def _permuted_forward(x_BHRTK, order_BHRT, back_BHRT):
    return _permuted(x_BHRTK, order_BHRT, back_BHRT), (order_BHRT, back_BHRT)


def _permuted_backward(saved, d_BHRTK):
    order_BHRT, back_BHRT = saved
    return _permuted(d_BHRTK, back_BHRT, order_BHRT), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


def _factors(buckets) -> tuple[int, ...]:
    return (buckets,) if isinstance(buckets, int) else tuple(buckets)
