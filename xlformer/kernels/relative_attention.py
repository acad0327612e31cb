"""The one attention operation of Transformer-XL, and the choice of its implementation.

Score of query t and key s, at distance d = t + M - s with M = S - T:

    qu_t . k_s + qw_t . r_d            (Dai et al. 2019, section 3.3: (a)+(c), (b)+(d))

qu and qw come biased (q + u, q + v of the paper) AND scaled by 1/sqrt(d_head), so the
gradients of q, u and v fall out of autodiff outside of any kernel.
"""

from __future__ import annotations

import jax

from xlformer.errors import UserError, did_you_mean
from xlformer.kernels import xla

IMPLEMENTATIONS = {"xla": xla.attention}


def relative_attention(
    qu_BTHK: jax.Array,
    qw_BTHK: jax.Array | None,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    r_SHK: jax.Array | None,
    *,
    window: int | None = None,
    key_start_BT: jax.Array | None = None,
    causal: bool = True,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Multi-head attention over [memory; segment] with relative positions.

    Args:
      qu_BTHK: content queries, biased and scaled.
      qw_BTHK: position queries, biased and scaled; its K may differ from that of qu (a
        column of ones beside a column of r is a bias per distance). None without r.
      k_BSHK, v_BSHK: keys and values, oldest first; the last T are the segment's own.
      r_SHK: row d belongs to distance d, ascending; None for attention without
        relative positions. With causal=False there are T-1 more rows in front, for the
        distances -(T-1) to -1.
      window: largest visible distance, self being 0; None is everything.
      key_start_BT: index in S of the first visible key of each query, non-decreasing in
        T and never past the query itself. It carries partly filled memory, resets and
        padding on the left.
      causal: no key after the query is visible.
      dropout_rate: rate of dropout on the attention probabilities.
      dropout_key: a jax.random key, or one for each row, [B]; None switches it off.
      implementation: 'auto' or a name of IMPLEMENTATIONS.

    Returns:
      The attended values [B, T, H, K] in the dtype of v.
    """
    T, S = qu_BTHK.shape[1], k_BSHK.shape[1]
    if (qw_BTHK is None) != (r_SHK is None):
        raise ValueError("pass both qw_BTHK and r_SHK, or neither")
    rows = S if causal else S + T - 1
    if r_SHK is not None and r_SHK.shape[0] != rows:
        raise ValueError(f"r_SHK has {r_SHK.shape[0]} rows, expected {rows}")
    if implementation == "auto":
        implementation = "xla"
    if implementation not in IMPLEMENTATIONS:
        near = did_you_mean(implementation, ["auto", *IMPLEMENTATIONS])
        raise UserError(f"config.model.attention={implementation!r}{near}")
    with jax.named_scope(f"relative_attention_{implementation}"):
        return IMPLEMENTATIONS[implementation](
            qu_BTHK,
            qw_BTHK,
            k_BSHK,
            v_BSHK,
            r_SHK,
            window=window,
            key_start_BT=key_start_BT,
            causal=causal,
            dropout_rate=dropout_rate if dropout_key is not None else 0.0,
            dropout_key=dropout_key,
        )
