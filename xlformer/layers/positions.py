"""Sinusoids of distances and positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def sinusoid(positions: np.ndarray | jax.Array, d_model: int, dtype) -> jax.Array:
    """[sin(p w_i)..., cos(p w_i)...] of each position, [..., d_model].

    The halves are concatenated, not interleaved; w_i = 10000^(-2i/d_model) (Dai et al.
    2019, as coded). Known positions are computed in float64 and rounded once: angles
    of thousands of radians lose three digits in float32, and in bfloat16 not even the
    integers above 256 are exact.
    """
    frequencies = 10000.0 ** (-np.arange(0, d_model, 2) / d_model)
    return _waves(positions, frequencies, dtype)


def timing_signal(positions: np.ndarray | jax.Array, d_model: int, dtype) -> jax.Array:
    """The sinusoid of tensor2tensor, which differs in the frequencies: [..., d_model].

    They reach from 1 to 1/10000 exactly, in d_model/2 - 1 equal ratios; an odd d_model
    has a 0 at the end.
    """
    count = d_model // 2
    frequencies = 10000.0 ** (-np.arange(count) / max(count - 1, 1))
    signal = _waves(positions, frequencies, dtype)
    odd = [(0, 0)] * (signal.ndim - 1) + [(0, d_model % 2)]
    return jnp.pad(signal, odd)


def _waves(positions, frequencies: np.ndarray, dtype) -> jax.Array:
    """Sines, then cosines."""
    if isinstance(positions, np.ndarray):
        angles = positions[..., None] * frequencies
        return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], -1), dtype)
    exact = jnp.promote_types(dtype, jnp.float32)
    # In float32 an angle of a million radians is off by 0.06. So whole blocks of
    # positions turn by what is left of their angle, known in float64, beyond 2 pi.
    block = 4096
    left = (block * frequencies) % (2 * np.pi)
    row = (1,) * positions.ndim + (-1,)
    near, far = (
        jnp.expand_dims(part, -1).astype(exact) * rates.astype(exact).reshape(row)
        for part, rates in (
            (positions % block, frequencies),
            (positions // block, left),
        )
    )
    angles = near + far
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1).astype(dtype)


def rotate(x_BSHK: jax.Array, table_BSK: jax.Array) -> jax.Array:
    """Turns pairs (i, i + K/2) by an angle for each position (rotary positions).

    Products of a query and a key that are both turned depend on their distance only (Su
    et al. 2021, arXiv:2104.09864). table_BSK is the sinusoid of each position, of each
    row or [1, S, K]. The paper pairs neighbours (2i, 2i + 1): the same up to the order
    of a head's columns.
    """
    sin, cos = (part[:, :, None] for part in jnp.split(table_BSK, 2, axis=-1))
    a, b = jnp.split(x_BSHK.astype(table_BSK.dtype), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.astype(x_BSHK.dtype)


def rotated(q_BTHK: jax.Array, k_BSHK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries and keys turned by their place in [memory; segment]."""
    S, K = k_BSHK.shape[1], k_BSHK.shape[-1]
    # Angles need at least float32, whatever the keys are: see `sinusoid`.
    dtype = jnp.promote_types(k_BSHK.dtype, jnp.float32)
    table_1SK = sinusoid(np.arange(S)[None], K, dtype)
    T = q_BTHK.shape[1]
    return rotate(q_BTHK, table_1SK[:, S - T :]), rotate(k_BSHK, table_1SK)


def distances(S: int, clamp_length: int) -> np.ndarray:
    """The distances 0 to S-1, none of them beyond clamp_length unless that is 0.

    The original clamps distances before it takes the sinusoid: whatever is farther than
    clamp_length looks as if it were at clamp_length.
    """
    return np.minimum(np.arange(S), clamp_length if clamp_length > 0 else S)


def nearest_rows(table_length: int, S: int, clamp_length: int) -> np.ndarray:
    """Row of a learned table for each distance 0 to S-1 (attention type 1).

    The table is right-aligned: its last row belongs to distance 0. clamp_length keeps
    that many rows; whatever lies farther uses the farthest row kept.
    """
    kept = min(clamp_length, table_length) if clamp_length > 0 else table_length
    return table_length - 1 - np.minimum(np.arange(S), kept - 1)
