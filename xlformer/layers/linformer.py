"""Attention to sums over the length (Linformer: Wang et al. 2020, arXiv:2006.04768).

    softmax(q (E^T k)^T) (F^T v)

Keys and values of N positions become P rows each, by the learned E and F. Every row
sums over all positions, so that there is no causal form.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xlformer.errors import UserError


def linformer_attention(
    q_BTHK, k_BSHK, v_BSHV, e_NP, f_NP, *, valid_BT=None
) -> jax.Array:
    """The attended values [B, T, H, V]; sums and softmax in at least float32.

    Where the program of lucidrains shares keys and values, v is k and f is e
    (`share_kv`); where all heads share them, k and v have one head (`one_kv_head`).

    Args:
      q_BTHK: scaled queries.
      k_BSHK, v_BSHV: of H heads, or of one that all queries read.
      e_NP, f_NP: their first S rows are used.
      valid_BT: padding is False; nothing of it enters the sums, whatever it holds. What
        is attended from there means nothing. None where q has another length.

    Raises:
      UserError: there are more positions than rows of E.
    """
    B, S = k_BSHK.shape[:2]
    H = q_BTHK.shape[2]
    if S > e_NP.shape[0]:
        raise UserError(
            f"a segment of {S} tokens, but config.model.context_length="
            f"{e_NP.shape[0]}: Linformer's projection of the length ends there"
        )
    if valid_BT is not None:
        # 0 * NaN is NaN, also in the gradients of what nobody reads.
        q_BTHK, k_BSHK, v_BSHV = (
            jnp.where(valid_BT[:, :, None, None], x, 0)
            for x in (q_BTHK, k_BSHK, v_BSHV)
        )
    exact = jnp.promote_types(q_BTHK.dtype, jnp.float32)

    def product(letters, *arrays):
        return jnp.einsum(letters, *arrays, preferred_element_type=exact)

    def projected(x_BSHK, e_NP):
        # Rounded to its dtype at once: for a gradient of this product in bfloat16 that
        # is summed in float32 XLA has no program on a CPU (jaxlib 0.10.2).
        x_BPHK = jnp.einsum("BSHK,SP->BPHK", x_BSHK, e_NP[:S])
        return jnp.broadcast_to(x_BPHK, (B, x_BPHK.shape[1], H, x_BPHK.shape[3]))

    with jax.named_scope("length"):
        k_BPHK, v_BPHV = projected(k_BSHK, e_NP), projected(v_BSHV, f_NP)
    with jax.named_scope("scores"):
        weights_BHTP = jax.nn.softmax(product("BTHK,BPHK->BHTP", q_BTHK, k_BPHK))
    with jax.named_scope("values"):
        weights_BHTP = weights_BHTP.astype(v_BPHV.dtype)
        y_BTHV = product("BHTP,BPHV->BTHV", weights_BHTP, v_BPHV)
        return y_BTHV.astype(v_BSHV.dtype)
