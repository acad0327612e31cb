"""Multi-head attention over [memory; segment], with the four position encodings."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlformer.kernels.dropout import dropout
from xlformer.kernels.relative_attention import visible_attention
from xlformer.kernels.visibility import Visibility
from xlformer.layers import positions
from xlformer.sharding import constrain

# Types 0 to 3 are numbered as the original's attn_type; 4 is not in the original.
RELATIVE, LEARNED_RELATIVE, SINUSOID, LEARNED_ABSOLUTE, ROTARY = range(5)
# Logical axes of the parameters: see models.parameters.param_axes.
PARAM_AXES = {
    "attention/qkv": ("embed", None, "heads", None),
    "attention/qkv_bias": (None, "heads", None),
    "attention/output": ("heads", None, "embed"),
    "attention/position": ("embed", "heads", None),
    "attention/distance": (None, "heads", None),
    "attention/distance_bias": (None, "heads"),
    "attention/u": ("heads", None),
    "attention/v": ("heads", None),
}
# The two sides of the matrices among them: see models.sides. Queries, keys and values
# are three.
MATRICES = {
    "attention/qkv": ((0,), (2, 3)),
    "attention/output": ((0, 1), (2,)),
    "attention/position": ((0,), (1, 2)),
}


class Attention(nn.Module):
    """Attention of type 0 to 3 of the original, or 4, without residual and norm.

    0: relative. Each distance d has a sinusoid, projected to r_d = W R_d, and biases u
       and v stand in for the position of the query (Dai et al. 2019, section 3.3).
    1: relative. Each distance has a learned row and a learned bias, beside u: what the
       original's code makes of Shaw et al. 2018.
    2, 3: nothing is left to do here, because absolute positions are in the input.
    4: rotary, which has no parameters.
    """

    n_head: int
    d_head: int
    attn_type: int
    own_biases: bool
    table_length: int
    clamp_length: int
    dropout: float
    attention_dropout: float
    kernel_init: Any
    dtype: Any
    implementation: str = "auto"
    output_bias: bool = False
    qkv_bias: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD,
        context_BSD,
        visibility: Visibility,
        *,
        r_SD=None,
        biases=None,
        keys=None,
        attend=None,
        fixed=0,
    ):
        """Attends from x to context = [memory; x].

        Args:
          x_BTD: queries are made of this.
          context_BSD: keys and values are made of this.
          visibility: what each query sees of the context.
          r_SD: sinusoid of each distance (type 0).
          biases: (u_HK, v_HK) shared by all layers, unless own_biases.
          keys: (probabilities, output), each a key a row; None switches dropout off.
          attend: (qu, qw, k, v) -> (y_BTHK, what it keeps), instead of the operation:
            where keys, values and positions of the memory are cached, context is x.
          fixed: how many leading positions of the context pass no gradient on.

        Returns:
          y_BTD, and what attend keeps, else None.
        """
        probability_key, output_key = keys or (None, None)
        D, S = x_BTD.shape[-1], context_BSD.shape[1]
        q_BTHK, k_BSHK, v_BSHK = self._heads(x_BTD, context_BSD, fixed)
        out_HKD = self._kernel("output", (self.n_head, self.d_head, D))
        with jax.named_scope("positions"):
            # A cached memory has projected its rows of the positions already.
            rows = None if attend else (r_SD, S)
            qu_BTHK, qw_BTHK, r_SHK = self._position_terms(q_BTHK, biases, rows)
        if attend:
            y_BTHK, kept = attend(qu_BTHK, qw_BTHK, k_BSHK, v_BSHK)
        else:
            kept = None
            if self.attn_type == ROTARY:
                qu_BTHK, k_BSHK = positions.rotated(qu_BTHK, k_BSHK)
            y_BTHK = visible_attention(
                qu_BTHK,
                qw_BTHK,
                k_BSHK,
                v_BSHK,
                r_SHK,
                visibility,
                dropout_rate=self.attention_dropout,
                dropout_key=probability_key,
                implementation=self.implementation,
            )
        with jax.named_scope("output"):
            y_BTD = jnp.einsum("BTHK,HKD->BTD", y_BTHK, out_HKD)
            if self.output_bias:
                bias_D = self.param("output_bias", nn.initializers.zeros, (D,))
                y_BTD = y_BTD + bias_D.astype(self.dtype)[None, None]
        return dropout(y_BTD, self.dropout, output_key), kept

    def _kernel(self, name, shape):
        # Parameters stay in the dtype they are stored in; the copy in use is cast.
        return self.param(name, self.kernel_init, shape).astype(self.dtype)

    def _heads(self, x_BTD, context_BSD, fixed):
        """Queries of x, keys and values of the context."""
        # One parameter for the three projections, in the order of the original's, and
        # three products: queries are made of x alone, keys and values of the context.
        shape = (x_BTD.shape[-1], 3, self.n_head, self.d_head)
        qkv_DCHK = self._kernel("qkv", shape)
        with jax.named_scope("qkv"):
            q_BTHK = jnp.einsum("BTD,DHK->BTHK", x_BTD, qkv_DCHK[:, 0])
            k_BSHK = projected(context_BSD, qkv_DCHK[:, 1], fixed)
            v_BSHK = projected(context_BSD, qkv_DCHK[:, 2], fixed)
            found = q_BTHK, k_BSHK, v_BSHK
            if self.qkv_bias:
                bias_CHK = self.param("qkv_bias", nn.initializers.zeros, shape[1:])
                bias_CHK = bias_CHK.astype(self.dtype)
                found = [x + bias_CHK[c][None, None] for c, x in enumerate(found)]
            # Heads lie on `tensor`, so that each device attends with its own; only the
            # output is summed over that axis.
            return tuple(constrain(x, "batch", None, "heads", None) for x in found)

    def _position_terms(self, q_BTHK, biases, rows):
        """(qu_BTHK, qw_BTHK, r_SHK), the last only if `rows` = (r_SD, S) is given."""
        heads = (self.n_head, self.d_head)
        # Queries are scaled and biased out here, so that no kernel knows of scales or
        # biases: the gradients of u and v are sums that autodiff makes by itself.
        scale = self.d_head**-0.5
        if self.attn_type in (SINUSOID, LEARNED_ABSOLUTE, ROTARY):
            return q_BTHK * scale, None, None
        r_SHK = None
        if self.attn_type == RELATIVE:
            # The TensorFlow original has a pair in each layer with untie_r; the PyTorch
            # original knows only one pair for all layers.
            if self.own_biases:
                biases = self._kernel("u", heads), self._kernel("v", heads)
            u_HK, v_HK = (b.astype(self.dtype)[None, None] for b in biases)
            if rows:
                r_SD, _ = rows
                position_DHK = self._kernel("position", (r_SD.shape[-1], *heads))
                r_SHK = jnp.einsum("SD,DHK->SHK", r_SD, position_DHK)
            return (q_BTHK + u_HK) * scale, (q_BTHK + v_HK) * scale, r_SHK
        if rows:
            table_NHK = self._kernel("distance", (self.table_length, *heads))
            shape, zeros = (self.table_length, self.n_head), nn.initializers.zeros
            bias_NH = self.param("distance_bias", zeros, shape).astype(self.dtype)
            r_SHK = learned_rows(table_NHK, bias_NH, rows[1], self.clamp_length)
        # q . E_d + b_d is a single product if b_d is appended to E_d and a 1 to q. The
        # scale applies to both terms.
        ones = jnp.ones_like(q_BTHK[..., :1])
        qw_BTHK = jnp.concatenate([q_BTHK, ones], axis=-1) * scale
        return (q_BTHK + self._kernel("u", heads)[None, None]) * scale, qw_BTHK, r_SHK


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def projected(context_BSD, kernel_DHK, fixed):
    """Projects a context to keys or values.

    No work is done for the gradients of its first `fixed` positions. They belong to the
    memory, which passes none on, but autodiff would compute them before they are thrown
    away: with M = T a ninth of the operations of all projections in training.
    """
    return jnp.einsum("BSD,DHK->BSHK", context_BSD, kernel_DHK)


def _save(context_BSD, kernel_DHK, fixed):
    return projected(context_BSD, kernel_DHK, fixed), (context_BSD, kernel_DHK)


def _backward(fixed, saved, d_BSHK):
    context_BSD, kernel_DHK = saved
    # The memory takes no gradient, but the weights do learn from it: only the first
    # product leaves it out.
    dx_BTD = jnp.einsum("BTHK,DHK->BTD", d_BSHK[:, fixed:], kernel_DHK)
    dkernel_DHK = jnp.einsum("BSD,BSHK->DHK", context_BSD, d_BSHK)
    return jnp.pad(dx_BTD, ((0, 0), (fixed, 0), (0, 0))), dkernel_DHK


projected.defvjp(_save, _backward)


def learned_rows(table_NHK, bias_NH, S: int, clamp_length: int) -> jax.Array:
    """The rows of type 1, [S, H, K + 1]: the bias of a distance is its last column."""
    rows = positions.nearest_rows(table_NHK.shape[0], S, clamp_length)
    return jnp.concatenate([table_NHK[rows], bias_NH[rows][..., None]], axis=-1)
