"""One head of attention, without positions, over vectors in a ring (Merity 2019).

    Q = sigmoid(qs) * norm(W x + b)     the one matrix that the sequence meets
    K = sigmoid(ks) * m
    V = vs * m                          m: the remembered vectors, and the segment's own

Nothing says in which order the vectors stand: each is written once, into the slot of
the oldest one, and none is moved. P positions are remembered, those of the segment
among them: a segment of L tokens overwrites the L oldest, and sees the P - L others.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xlformer.kernels import watching
from xlformer.kernels.dropout import keep_pairs
from xlformer.layers import memory as memory_lib

# Queries whose scores exist at a time: of 16 rows and 5,000 slots they are 82 MB.
QUERIES = 256


class Ring(NamedTuple):
    """The vectors at the last P positions.

    Attributes:
      rows: one array [B, P, D] for each block that attends.
      length_B: int32, how many slots of a row count, the newest ones.
      next_B: int32, the slot that is written next, behind the newest.
    """

    rows: tuple
    length_B: Any
    next_B: Any


class Seen(NamedTuple):
    """What the queries of a segment see, in the same way in every block.

    Places count from the oldest slot, 0, over the newest, P - 1, to the segment's own
    vectors, P to P + T - 1.

    Attributes:
      place_BP: of each slot, before the segment is written.
      start_BT: the first place that each query sees; resets and cold slots hide others.
      length_B: how many tokens of the segment count, and so how many slots are lost.
    """

    place_BP: Any
    start_BT: Any
    length_B: Any


class Drops(NamedTuple):
    """Dropout of the probabilities, by one hash of (row, query, vector).

    Attributes:
      rate: of each probability.
      seeds_B2: two words a row, as of kernels.dropout.seeds.
    """

    rate: float
    seeds_B2: Any


# The ring -----------------------------------------------------------------------------


def empty(batch_size: int, P: int, D: int, *, blocks: int, dtype) -> Ring:
    """A ring with nothing in it."""
    zero_B = jnp.zeros(batch_size, jnp.int32)
    rows = tuple(jnp.zeros((batch_size, P, D), dtype) for _ in range(blocks))
    return Ring(rows, zero_B, zero_B)


def places(next_B, P: int) -> jax.Array:
    """How many slots are older than each one, [B, P]."""
    return (jnp.arange(P)[None] - next_B[:, None]) % P


def write(rows_BPD, x_BTD, seen: Seen, next_B) -> jax.Array:
    """The ring's vectors with those of a segment in place of the oldest."""
    P, T = rows_BPD.shape[1], x_BTD.shape[1]
    index_T = jnp.arange(T)
    # Beyond the end, where padding is, nothing is written.
    slot_BT = jnp.where(
        index_T[None] < seen.length_B[:, None],
        (next_B[:, None] + index_T[None]) % P,
        P,
    )

    def one(rows_PD, slot_T, x_TD):
        return rows_PD.at[slot_T].set(x_TD, mode="drop", unique_indices=True)

    return jax.vmap(one)(rows_BPD, slot_BT, x_BTD.astype(rows_BPD.dtype))


def after(ring: Ring, rows: tuple, seen: Seen, resets_BT) -> Ring:
    """The ring after the segment, whose vectors are in `rows` already."""
    P = rows[0].shape[1]
    length_B = memory_lib.next_length(ring.length_B, resets_BT, seen.length_B, M=P)
    return Ring(rows, length_B, (ring.next_B + seen.length_B) % P)


def seen(ring: Ring, resets_BT, lengths, T: int, window: int | None = None) -> Seen:
    """What a segment of T tokens sees.

    lengths says how many of them count: None is all, a number, or one a row. window is
    the largest visible distance.
    """
    P = ring.rows[0].shape[1]
    start_BT = memory_lib.key_start(ring.length_B, resets_BT, M=P, T=T)
    if window is not None:
        start_BT = jnp.maximum(start_BT, P + jnp.arange(T)[None] - window)
    length_B = jnp.broadcast_to(T if lengths is None else lengths, ring.next_B.shape)
    return Seen(places(ring.next_B, P), start_BT, length_B)


# Masks hide a value by giving it the weight 0, but 0 * NaN is NaN. Therefore nothing is
# remembered that is not finite, and slots that nobody may see need no cleaning in every
# segment, which would be a copy of all of them.


def finite(x: jax.Array) -> jax.Array:
    """The same with 0 for what is not finite.

    Of a segment's vectors it hides nothing: they are a normalised LSTM's, whose own
    state carries a NaN on to all that follows.
    """
    return jnp.where(jnp.isfinite(x), x, 0)


def repaired(rows_BPD) -> jax.Array:
    """`finite` of a ring that comes from elsewhere; no copy where all of it is."""

    def broken(rows_BPD):
        return ~jnp.isfinite(rows_BPD).all()

    # A loop that is not entered, and no `cond`: its carry is changed in place.
    return lax.while_loop(broken, finite, lax.stop_gradient(rows_BPD))


# Attention ----------------------------------------------------------------------------


def overparameterised(gate_D, kernel_DCN, bias_CN) -> jax.Array:
    """sigmoid(f) * tanh(c) with (c, f) = W sigmoid(gate) + b: the vector vs, [D].

    It is the same for all tokens, and can be stored in place of what makes it.
    """
    z_CN = jnp.einsum("D,DCN->CN", jax.nn.sigmoid(gate_D), kernel_DCN) + bias_CN
    return jax.nn.sigmoid(z_CN[1]) * jnp.tanh(z_CN[0])


def attend(q_BTD, own, memory, seen: Seen, drops: Drops | None = None) -> jax.Array:
    """The attended vectors [B, T, D]; softmax in at least float32.

    Args:
      q_BTD: scaled queries.
      own, memory: keys and values of the segment, [B, T, D], and of all slots,
        [B, P, D]. Both arrays of a pair may be one; all must be finite where anyone is
        not to see them. Slots pass no gradient on.
      seen: what each query sees.
      drops: None keeps all probabilities.
    """
    T = q_BTD.shape[1]
    groups = math.ceil(T / QUERIES)
    step = functools.partial(_attend, own=own, memory=memory, seen=seen, drops=drops)
    start_BT = jnp.broadcast_to(seen.start_BT, q_BTD.shape[:2])
    if groups == 1 or watching.watched():
        return step((q_BTD, start_BT, jnp.arange(T)))
    # As even as they can be; a few queries more than there are see what the last sees.
    C = math.ceil(T / groups)
    more = groups * C - T

    def grouped(x_BT):
        x_BT = jnp.pad(x_BT, ((0, 0), (0, more)) + ((0, 0),) * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(len(x_BT), groups, C, *x_BT.shape[2:]), 1, 0)

    parts = grouped(q_BTD), grouped(start_BT), jnp.arange(groups * C).reshape(-1, C)
    # Scores are made again for the backward pass: kept, all would be there at once.
    y_GBCD = lax.map(jax.checkpoint(step), parts)
    B, D = q_BTD.shape[0], q_BTD.shape[2]
    return jnp.moveaxis(y_GBCD, 0, 1).reshape(B, groups * C, D)[:, :T]


def _attend(queries, *, own, memory, seen: Seen, drops):
    q_BCD, start_BC, index_C = queries
    (own_key_BSD, own_value_BSD), (key_BPD, value_BPD) = own, memory
    exact = jnp.promote_types(q_BCD.dtype, jnp.float32)
    P, S = key_BPD.shape[1], own_key_BSD.shape[1]
    own_S = P + jnp.arange(S)
    with jax.named_scope("scores"):
        score_BCP = jnp.einsum(
            "BCD,BPD->BCP", q_BCD, key_BPD, preferred_element_type=exact
        )
        score_BCS = jnp.einsum(
            "BCD,BSD->BCS", q_BCD, own_key_BSD, preferred_element_type=exact
        )
        first_BC = jnp.maximum(start_BC, seen.length_B[:, None])
        sees_BCP = seen.place_BP[:, None] >= first_BC[..., None]
        sees_BCS = own_S[None, None] >= start_BC[..., None]
        sees_BCS &= own_S[None, None] <= P + index_C[None, :, None]
        # A query always sees its own vector, so that the greatest score is a true one.
        lowest = jnp.finfo(exact).min
        score_BCP = jnp.where(sees_BCP, score_BCP, lowest)
        score_BCS = jnp.where(sees_BCS, score_BCS, lowest)
        top_BC1 = jnp.maximum(
            score_BCP.max(-1, keepdims=True), score_BCS.max(-1, keepdims=True)
        )
        top_BC1 = lax.stop_gradient(top_BC1)
        weight_BCP, weight_BCS = (jnp.exp(x - top_BC1) for x in (score_BCP, score_BCS))
        sum_BC1 = weight_BCP.sum(-1, keepdims=True) + weight_BCS.sum(-1, keepdims=True)
    watching.tell(
        lambda: watching.by_distance(
            _both(weight_BCP, weight_BCS)[:, None] / sum_BC1[:, None],
            _both(sees_BCP, sees_BCS)[:, None],
            P
            + index_C[None, None, :, None]
            - _both(seen.place_BP[:, None], own_S[None, None])[:, None],
        )
    )
    if drops is not None:
        weight_BCP = _dropped(weight_BCP, drops, index_C, jnp.arange(P))
        weight_BCS = _dropped(weight_BCS, drops, index_C, own_S)
    with jax.named_scope("values"):
        y_BCD = jnp.einsum(
            "BCP,BPD->BCD",
            weight_BCP.astype(value_BPD.dtype),
            value_BPD,
            preferred_element_type=exact,
        )
        y_BCD += jnp.einsum(
            "BCS,BSD->BCD",
            weight_BCS.astype(own_value_BSD.dtype),
            own_value_BSD,
            preferred_element_type=exact,
        )
        return (y_BCD / sum_BC1).astype(q_BCD.dtype)


def _both(of_slots, own):
    """Of all that is seen, the last axis; the others broadcast."""
    shape = jnp.broadcast_shapes(of_slots.shape[:-1], own.shape[:-1])
    parts = (jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in (of_slots, own))
    return jnp.concatenate([*parts], -1)


def _dropped(weight_BCS, drops: Drops, index_C, index_S):
    seed_a, seed_b = (drops.seeds_B2[:, k, None, None] for k in range(2))
    queries, keys = (x.astype(jnp.int32) for x in (index_C, index_S))
    queries, keys = queries[None, :, None], keys[None, None]
    keep_BCS = keep_pairs(seed_a, seed_b, queries, keys, drops.rate)
    return jnp.where(keep_BCS, weight_BCS / (1 - drops.rate), 0)
