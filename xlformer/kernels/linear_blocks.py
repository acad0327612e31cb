"""Linear attention a block of positions at a time: the products of a few chunks each.

A chunk's queries meet its own keys in one matrix and all earlier ones in their sums
(Katharopoulos et al. 2020; Hua et al. 2022, section 3.2). The backward pass computes
each block again from q, k, v and the sums before it.

Letters: N blocks of n chunks of C queries t or keys s; U = V + 1, the values with a
column of ones, whose sums are the denominators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from xlformer.kernels.products import product, wide

# The logarithm of a key that is not there; -inf minus itself would be NaN.
NO_KEY = -1e30
# As a first visible key: that of the carried sums, which come before key 0.
CARRIED = -1
# Kept for the backward pass: what is divided, U numbers a query; to make it again would
# be a tenth of all products.
_KEPT = "linear_attention_undivided"


class Maps(NamedTuple):
    """What makes features.

    Attributes:
      query: q -> its factor.
      key: the arrays of k -> logarithm (or None for 0) and factor.
      normalise: whether the values are divided by the norms.
      overflows: whether features of what is finite may not be.
    """

    query: Callable
    key: Callable
    normalise: bool = True
    overflows: bool = False


class Carry(NamedTuple):
    """What one block leaves for the next.

    Attributes:
      sums: [B, H, U, M], over what the last query saw, divided by exp(scale).
      scale: [B, H], the largest logarithm in them.
      last_bad: [B, H], the position of the last key that was not finite.
    """

    sums: jax.Array
    scale: jax.Array
    last_bad: jax.Array


class Inputs(NamedTuple):
    """Arrays [B, T, ...]."""

    q: jax.Array
    k: tuple[jax.Array, ...]
    v: jax.Array
    start: jax.Array
    valid: jax.Array

    def blocks(self, size: int) -> tuple[jax.Array, Inputs]:
        """The first position of each block, [N], and the inputs as [N, B, size, ...].

        The padding of the last block repeats the last position, but is not valid.
        """
        T = self.v.shape[1]
        N = -(-T // size)

        rest = N * size - T

        def split(x):
            if rest:
                x = jnp.concatenate([x, jnp.repeat(x[:, -1:], rest, 1)], 1)
            return jnp.moveaxis(x.reshape(-1, N, size, *x.shape[2:]), 1, 0)

        there_NBS = (jnp.arange(N * size) < T).reshape(N, 1, size)
        first_N = jnp.arange(N, dtype=jnp.int32) * size
        inputs = jax.tree.map(split, self)
        return first_N, inputs._replace(valid=inputs.valid & there_NBS)


def causal(maps: Maps, carry: Carry, inputs: Inputs, n: int, C: int):
    """y [B, T, H, V], and the last Carry."""
    one = functools.partial(_causal_block, maps, n)
    carry, y = _scan(one, carry, *inputs.blocks(n * C))
    return _joined(y, inputs.v.shape[1]), carry


def bidirectional(maps: Maps, carry: Carry, inputs: Inputs, size: int):
    """y [B, T, H, V]: every query sees every key from the row's start on."""
    first_N, split = inputs.blocks(size)
    add = functools.partial(_add_block, maps, inputs.start[:, -1:])
    carry, _ = _scan(add, carry, first_N, split)

    def attend(_, block):
        inputs = block[1]
        q_f, bad = _queries(maps, inputs)
        y = product("BHtM,BHUM->BHtU", q_f, carry.sums.astype(q_f.dtype))
        spoilt = bad | (carry.last_bad >= 0)[..., None]
        return None, _values(y, spoilt, inputs, maps.normalise)

    _, y = _scan(attend, None, first_N, split)
    return _joined(y, inputs.v.shape[1])


def _scan(one, carry, first_N, blocks):
    """lax.scan whose backward pass computes each block again."""
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    one = jax.checkpoint(one, prevent_cse=len(first_N) == 1, policy=policy)
    if len(first_N) > 1:
        return lax.scan(one, carry, (first_N, blocks))
    carry, y = one(carry, jax.tree.map(lambda x: x[0], (first_N, blocks)))
    return carry, jax.tree.map(lambda x: x[None], y)


def _joined(y, T: int):
    """[N, B, H, size, V] -> [B, T, H, V]."""
    N, B, H, size, V = y.shape
    return y.transpose(1, 0, 3, 2, 4).reshape(B, N * size, H, V)[:, :T]


def _causal_block(maps, n, carry, block):
    """n chunks of queries and their keys, after the sums over all keys before them."""
    first, inputs = block
    B, size, H, _ = inputs.v.shape

    def chunks(x):  # [B, H or 1, size, ...] -> [B, H or 1, n, C, ...]
        return x.reshape(*x.shape[:2], n, size // n, *x.shape[3:])

    q_f, q_bad = _queries(maps, inputs)
    k_log, k_f, u, k_bad = _keys(maps, inputs, inputs.valid)
    k_log, q_f, k_f, u = (chunks(x) for x in (k_log, q_f, k_f, u))
    start = chunks(inputs.start[:, None])
    position = first + jnp.arange(size, dtype=jnp.int32)
    position_nC = position.reshape(1, 1, n, -1)
    # Which keys of its chunk a query sees, and whether it sees the sums before.
    sees_ts = jnp.tril(jnp.ones((size // n,) * 2, bool))[None, None, None]
    sees_ts &= position_nC[..., None, :] >= start[..., None]
    sees_sums = start < position_nC[..., :1]

    log = jnp.where(sees_ts[..., -1, :], k_log, NO_KEY)  # what the last query sees
    scale = log.max(-1)
    weighed = u * jnp.exp(log - scale[..., None])[..., None].astype(u.dtype)
    sums = product("BHnsU,BHnsM->BHnUM", weighed, k_f)
    before, carry_sums, scale, carry_scale = _prefix(
        carry, sums, scale, start[..., -1], first
    )

    # The largest logarithm among the keys that each query sees.
    most = jnp.where(sees_ts, k_log[..., None, :], NO_KEY).max(-1)
    scale = jnp.where(sees_sums, scale[..., None], NO_KEY)
    most = jnp.maximum(most, scale)
    # (Where it does not see the key the difference could be positive.)
    weights = jnp.where(sees_ts, k_log[..., None, :] - most[..., None], NO_KEY)
    pairs = product("BHntM,BHnsM->BHnts", q_f, k_f)
    weights = (jnp.where(sees_ts, pairs, 0) * jnp.exp(weights)).astype(u.dtype)
    y = product("BHnts,BHnsU->BHntU", weights, u)
    decay = jnp.where(sees_sums, jnp.exp(scale - most), 0)[..., None]
    y += decay * product("BHntM,BHnUM->BHntU", q_f, before.astype(q_f.dtype))

    last_bad = jnp.where(k_bad, position[None, None], CARRIED - 1)
    last_bad = jnp.maximum(lax.cummax(last_bad, axis=2), carry.last_bad[..., None])
    spoilt = q_bad | (last_bad >= inputs.start[:, None])
    y = _values(y.reshape(B, H, size, -1), spoilt, inputs, maps.normalise)
    return Carry(carry_sums, carry_scale, last_bad[..., -1]), y


def _prefix(carry, sums, scale, start_n, first):
    """The sums before each chunk [B, H, n, U, M], those after the block, both scales.

    Args:
      carry: what came before the block.
      sums, scale: those of each chunk, over the keys that its last query sees.
      start_n: the first that this query sees, [B, 1, n].
      first: the first position of the block.
    """
    if sums.shape[2] == 1:
        return _prefix_of_one(carry, sums[:, :, 0], scale[..., 0], start_n < first)
    sums = jnp.concatenate([carry.sums[:, :, None], sums], 2)
    scale = jnp.concatenate([carry.scale[:, :, None], scale], 2)
    # What ends with another start is of another text.
    before = jnp.minimum(start_n[..., :1], first - 1)
    start_n = jnp.concatenate([before, start_n], -1)
    sees_ks = jnp.tril(jnp.ones((start_n.shape[-1],) * 2, bool))[None, None]
    sees_ks &= start_n[..., None] == start_n[..., None, :]
    scale = jnp.where(sees_ks, scale[..., None, :], NO_KEY)
    most = scale.max(-1)
    decay = jnp.where(sees_ks, jnp.exp(scale - most[..., None]), 0)
    sums = jnp.einsum("BHks,BHsUM->BHkUM", decay, sums, precision=lax.Precision.HIGHEST)
    return sums[:, :, :-1], sums[:, :, -1], most[..., :-1], most[..., -1]


def _prefix_of_one(carry, sums, scale, sees_B1):
    """_prefix of one chunk: a step of generation reads and writes the sums once."""
    before = jnp.where(sees_B1[..., 0], carry.scale, NO_KEY)
    most = jnp.maximum(before, scale)
    old = jnp.where(sees_B1[..., 0], jnp.exp(before - most), 0)
    sums = old[..., None, None] * carry.sums + (
        jnp.exp(scale - most)[..., None, None] * sums
    )
    return carry.sums[:, :, None], sums, carry.scale[..., None], most


def _add_block(maps, start_B1, carry, block):
    """The sums with those over the keys of one more block."""
    first, inputs = block
    position_1S = first + jnp.arange(inputs.v.shape[1], dtype=jnp.int32)[None]
    log, k_f, u, bad = _keys(maps, inputs, inputs.valid & (position_1S >= start_B1))
    scale = jnp.maximum(carry.scale, log.max(-1))
    u *= jnp.exp(log - scale[..., None])[..., None].astype(u.dtype)
    sums = jnp.exp(carry.scale - scale)[..., None, None] * carry.sums
    sums += product("BHsU,BHsM->BHUM", u, k_f)
    last_bad = jnp.where(bad.any(-1), first, carry.last_bad)
    return Carry(sums, scale, last_bad), None


def _queries(maps, inputs):
    """Their features, [B, H, S, M], and which are not finite."""
    (q,), ok = _finite([inputs.q])
    if maps.overflows:
        (q,), ok = _no_overflow(maps.query(q), [q], ok)
    return maps.query(q), ~ok


def _keys(maps, inputs, there_BS):
    """Logarithm and features of the keys, their values, and which are not finite.

    One number that is not finite would spoil a whole product, even where its weight is
    0. So it is taken out, and put back in what the queries that see it get.
    """
    (*k, v), ok = _finite([*inputs.k, inputs.v])
    if maps.overflows:
        k, ok = _no_overflow(maps.key(*k)[1], k, ok)
    log, f = maps.key(*k)
    there = there_BS[:, None]
    u = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
    if log is None:
        log = jnp.zeros(ok.shape, wide(u.dtype))
    else:
        # exp(log) multiplies a key's features or as well its row of u, where the
        # gradient has V + 1 numbers a key and not M; elsewhere log is a constant.
        constant = lax.stop_gradient(log)
        u *= jnp.exp(log - constant)[..., None].astype(u.dtype)
        log = constant.astype(wide(u.dtype))
    u = jnp.where((ok & there)[..., None], u, 0)
    return jnp.where(ok & there, log, NO_KEY), f, u, ~ok & there


def _no_overflow(f, arrays, ok):
    """Arrays with zeros where the features made of them are not finite either.

    The features are made again of what is left: the gradient of exp would be 0 times
    infinity.
    """
    ok &= jnp.isfinite(lax.stop_gradient(f)).all(-1)
    return [jnp.where(ok[..., None], x, 0) for x in arrays], ok


def _finite(arrays):
    """Arrays [B, S, H, ...] heads first, 0 where a vector of any is not finite."""
    arrays = [x.swapaxes(1, 2) for x in arrays]
    shape = arrays[0].shape[:3]
    largest = [jnp.abs(x).reshape(*shape, -1).max(-1) for x in arrays]
    ok = functools.reduce(jnp.logical_and, [x < jnp.inf for x in largest])

    def clean(x):
        return jnp.where(ok.reshape(*shape, *[1] * (x.ndim - 3)), x, 0)

    return [clean(x) for x in arrays], ok


def _values(y, spoilt, inputs, normalise):
    """The values over the norms, [B, H, S, V]; linear_attention says when 0."""
    y = checkpoint_name(y, _KEPT)
    there = inputs.valid[:, None]
    if normalise:
        least = 1e-300 if y.dtype == jnp.float64 else 1e-30
        there &= ~(jnp.abs(y[..., -1]) <= least)  # NaN stays
        norm = jnp.where(there, y[..., -1], 1)
        # By a constant first, which leaves norms of 1: the gradient of a quotient
        # squares the norm, and the square of 1e-20 is 0.
        constant = lax.stop_gradient(norm)
        y = y / constant[..., None] / (norm / constant)[..., None]
    y = jnp.where(there[..., None], y[..., :-1], 0)
    spoilt = (spoilt & inputs.valid[:, None])[..., None]
    return jnp.where(spoilt, jnp.nan, y).astype(inputs.v.dtype)
