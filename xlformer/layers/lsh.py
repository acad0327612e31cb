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
where all chunks see each other. Padding takes no place among them.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from xlformer.layers.buckets import Ring

# How scores are scaled. UNIT: unit keys (the authors, Hugging Face); UNIT_SCALED: by
# another 1/sqrt(K) (reformer-pytorch).
UNIT, UNIT_SCALED = "unit", "unit_scaled"
# The score of a token with itself: far below all others, far above what is hidden.
SELF = {UNIT: -1e5, UNIT_SCALED: -5e4}


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


def hashed(qk_BTHK, rotations_BHKRN, buckets=None) -> jax.Array:
    """The bucket of each token in each round, [B, H, R, T]; round r counts on from r-1.

    Args:
      rotations_BHKRN: B and H may be 1.
      buckets: how many, an even number; or several, whose product it is: then N is half
        of their sum, which takes less memory. None is 2N.
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
    return bucket_BHRT + count * jnp.arange(bucket_BHRT.shape[2])[None, None, :, None]


def lsh_attention(
    qk_BTHK,
    v_BTHV,
    rotations_BHKRN,
    lsh: Lsh,
    *,
    buckets=None,
    valid_BT=None,
) -> jax.Array:
    """The attended values [B, T, H, V], for any T.

    Args:
      qk_BTHK: queries, not scaled, and keys, of any length.
      rotations_BHKRN: of R rounds, see `rotations`; B and H may be 1.
      buckets: see `hashed`.
      valid_BT: padding is False, and changes nothing, whatever it holds and wherever
        it stands. What is attended from there means nothing.
    """
    if valid_BT is not None:
        # 0 * NaN is NaN, also in the gradients of what nobody reads.
        qk_BTHK, v_BTHV = (
            jnp.where(valid_BT[:, :, None, None], x, 0) for x in (qk_BTHK, v_BTHV)
        )
    bucket_BHRT = None
    if lsh.chunk_length < qk_BTHK.shape[1]:
        bucket_BHRT = hashed(qk_BTHK, rotations_BHKRN, buckets)
    return attend(qk_BTHK, v_BTHV, bucket_BHRT, lsh, valid_BT=valid_BT)


def attend(
    qk_BTHK,
    v_BTHV,
    bucket_BHRT,
    lsh: Lsh,
    *,
    valid_BT=None,
    compact=True,
) -> jax.Array:
    """`lsh_attention` of buckets that are known; everything must be finite.

    Without buckets all tokens are one chunk, so that each sees all others. Otherwise
    memory is of the order of R T C (1 + before + after) for each head.

    compact: whether padding is sorted behind all rounds, so that the ring of a row is
      that of its tokens alone. Otherwise it takes places among them, in its buckets.
    """
    B, T, H, _ = qk_BTHK.shape
    if bucket_BHRT is None:
        bucket_BHRT = jnp.zeros((B, H, 1, T), jnp.int32)
        lsh, compact = Lsh(T, lsh.causal, before=0, scaling=lsh.scaling), False
    ring = Ring.of(
        bucket_BHRT,
        lsh.chunk_length,
        range(-lsh.before, lsh.after + 1),
        valid_BT,
        compact,
    )
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
        score_BHGCS = _masked(score_BHGCS, ring, lsh)
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
        if ring.short_B is not None:
            first_R = jnp.arange(share_BHRT1.shape[2]) == 0
            counts_BR = ~ring.short_B[:, None] | first_R[None]
            share_BHRT1 = jnp.where(counts_BR[:, None, :, None, None], share_BHRT1, 0)
        total_BHT1 = (share_BHRT1 * sum_BHRT1).sum(2)
        y_BHTV = (share_BHRT1 * y_BHRTV).sum(2) / total_BHT1
        return jnp.swapaxes(y_BHTV, 1, 2).astype(v_BTHV.dtype)


def _masked(score_BHGCS, ring: Ring, lsh: Lsh) -> jax.Array:
    """Scores of what is hidden become the lowest, of a token with itself SELF."""
    T = ring.bucket_BHRT.shape[3]
    query, key = ring.pairs(jnp.arange(T)[None, None, None], fill=T)
    sees = key < T
    if lsh.causal:
        sees &= key <= query
    if ring.real_BRT is not None:
        sees &= ring.pairs(ring.real_BRT[:, None], fill=False)[1]
    if lsh.same_bucket_only:
        own, other = ring.pairs(ring.bucket_BHRT)
        sees &= own == other
    if lsh.discount_duplicates:
        count = ring.meetings(lsh.same_bucket_only).astype(score_BHGCS.dtype)
        score_BHGCS -= jnp.log(count + 1e-9)
    score_BHGCS = jnp.where(sees, score_BHGCS, jnp.finfo(score_BHGCS.dtype).min)
    return jnp.where(query == key, SELF[lsh.scaling], score_BHGCS)


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


def _factors(buckets) -> tuple[int, ...]:
    return (buckets,) if isinstance(buckets, int) else tuple(buckets)
