"""Random projections of Performer, and when they are drawn (Choromanski et al. 2020).

A row w of W makes a feature, such as exp(w . x - |x|^2 / 2). With w ~ N(0, I) features
estimate exp(x . y) without bias; rows that are also orthogonal in blocks of K (section
2.4, theorem 2) do so with less error.

Both public programs take Q of a QR decomposition as it comes, with R thrown away. That
is no uniform rotation: LAPACK's first entry of Q is never positive, and features with
such rows are biased, by 36 % at x = y = +-0.5 e_1 with K = 2, by 4 % at K = 16. Here
each column has the sign of R's diagonal (Mezzadri 2007), which makes it uniform.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

REGULARISED = "regularised"  # SMREG, whose rows have one length


def projection(
    seed: int,
    layer,
    draw,
    *,
    features_name: str,
    m: int,
    K: int,
    orthogonal: bool = True,
    dtype=jnp.float32,
) -> jax.Array:
    """The rows W [m, K] of a layer's features.

    Args:
      seed: of the features, from 0 to 2^32 - 1; beyond, draws depend on jax_enable_x64.
      layer, draw: numbers, or traced ones: a vmap over layers is one batched QR.
      features_name: of kernels.features; rows of `regularised` have the norm sqrt(K),
        all others the norms of Gaussian vectors.
      orthogonal: rows are orthogonal within each K of them, the last block cut to m.
      dtype: of the result. It is drawn in float32 all the same, so that a run in
        float64 or bfloat16 has the same rows.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), layer), draw)
    rows_key, norms_key = jax.random.split(key)
    if not orthogonal:
        w_MK = jax.random.normal(rows_key, (m, K), jnp.float32)
        if features_name == REGULARISED:
            w_MK = unit(w_MK) * K**0.5
        return w_MK.astype(dtype)
    w_MK = rotations(rows_key, -(-m // K), K).reshape(-1, K)[:m]
    if features_name == REGULARISED:
        return (w_MK * K**0.5).astype(dtype)
    # Of Gaussians of their own: the directions know nothing of the lengths.
    norm_MK = jax.random.normal(norms_key, (m, K), jnp.float32)
    return (w_MK * jnp.linalg.norm(norm_MK, axis=1, keepdims=True)).astype(dtype)


def rotations(key, n: int, K: int) -> jax.Array:
    """Orthogonal matrices [n, K, K] in float32, uniform over all (Haar's measure)."""
    normal_NKK = jax.random.normal(key, (n, K, K), jnp.float32)
    q_NKK, r_NKK = jax.lax.platform_dependent(
        normal_NKK, cpu=jax.vmap(_factored_alone), default=jnp.linalg.qr
    )
    diagonal_NK = jnp.diagonal(r_NKK, axis1=1, axis2=2)
    return q_NKK * jnp.where(diagonal_NK < 0, -1.0, 1.0).astype(jnp.float32)[:, None]


@jax.custom_batching.sequential_vmap
def _factored_alone(normal_KK):
    """Q and R of one matrix; a vmap of it takes one after the other.

    LAPACK's call for several waits, on a thread of XLA's pool, for tasks of that pool:
    two devices on two cores stood still in their first step (jax 0.10.2).
    """
    return jnp.linalg.qr(normal_KK)


def unit(w_MK) -> jax.Array:
    """Rows of length 1."""
    return w_MK / jnp.linalg.norm(w_MK, axis=-1, keepdims=True)


def draw_number(step, interval: int) -> jax.Array:
    """Which draw is in use at a training step, int32.

    None is no training: draw 0, as at the first step. An interval of 0 never redraws.
    Sums of features of one draw mean nothing to another: what was carried over a
    redraw must be forgotten.
    """
    if step is None or not interval:
        return jnp.zeros((), jnp.int32)
    return jnp.asarray(step, jnp.int32) // interval
