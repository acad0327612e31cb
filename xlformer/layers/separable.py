"""Depth-wise convolution over positions, and the network that is made of two of them.

What a position sees is said as for attention, by the first one it may see, so that
resets and what came before the text cut it off. Its left context is an argument: the
last inputs of the segment before.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlformer.kernels.dropout import dropout
from xlformer.sharding import constrain

# tensor2tensor's sepconv: so many positions, then so many.
WIDTHS = (3, 5)
# How many positions of the layer's input reach an output through both, less its own.
REACH = sum(WIDTHS) - len(WIDTHS)
# Logical axes of the parameters: see models.parameters.param_axes.
PARAM_AXES = {
    "separable/in_depthwise": (None, "embed"),
    "separable/in_kernel": ("embed", "mlp"),
    "separable/in_bias": ("mlp",),
    "separable/out_depthwise": (None, "mlp"),
    "separable/out_kernel": ("mlp", "embed"),
}
# The two sides of the matrices among them: see models.sides.
MATRICES = {
    "separable/in_kernel": ((0,), (1,)),
    "separable/out_kernel": ((0,), (1,)),
}


def depthwise(x_BTF, kernel_WF, start_BT=None, context_BCF=None, *, causal=True):
    """Each channel's own weighted sum of the W positions around each one, [B, T, F].

    Args:
      x_BTF: the segment.
      kernel_WF: the last row weighs the position itself; where not causal the middle
        one does, and an even W looks one further ahead than back.
      start_BT: the first position that each one sees, 0 being the first of x and
        negative numbers being the context; None hides nothing.
      context_BCF: the positions before x, the newest last; zeros come before them.
      causal: whether no position sees a later one.
    """
    T, W = x_BTF.shape[1], kernel_WF.shape[0]
    left = W - 1 if causal else (W - 1) // 2
    if context_BCF is not None:
        x_BTF = jnp.concatenate([context_BCF[:, -left:], x_BTF], 1) if left else x_BTF
    missing = left + T - x_BTF.shape[1]
    x_BSF = jnp.pad(x_BTF, ((0, 0), (missing, W - 1 - left), (0, 0)))
    y_BTF = 0
    with jax.named_scope("depthwise"):
        for w in range(W):
            tap_BTF = x_BSF[:, w : w + T]
            if start_BT is not None and w < left:
                seen_BT = jnp.arange(T)[None] + (w - left) >= start_BT
                # Not a product with 0: what is not seen may be NaN.
                tap_BTF = jnp.where(seen_BT[..., None], tap_BTF, 0)
            y_BTF += tap_BTF * kernel_WF[w][None, None]
    return y_BTF


class SeparableNetwork(nn.Module):
    """Depth-wise, 1x1 and relu; depth-wise and 1x1: tensor2tensor's sepconv.

    In place of the feed-forward network. Each bias comes after its 1x1.
    """

    d_inner: int
    dropout: float
    kernel_init: Any
    dtype: Any
    causal: bool = True

    @nn.compact
    def __call__(self, x_BTD, start_BT=None, contexts=(None, None), keys=(None, None)):
        """The output, and the inputs of the two convolutions.

        Args:
          x_BTD: the segment.
          start_BT: as of `depthwise`.
          contexts: (BCD, BCF), what came before those inputs.
          keys: of dropout on the hidden units and on the output.
        """
        D, F = x_BTD.shape[-1], self.d_inner
        in_WD = self._depthwise("in_depthwise", WIDTHS[0], D)
        in_DF, in_F = self._pointwise("in", D, F)
        out_WF = self._depthwise("out_depthwise", WIDTHS[1], F)
        out_FD, out_D = self._pointwise("out", F, D)
        with jax.named_scope("separable"):
            options = {"causal": self.causal}
            y_BTD = depthwise(x_BTD, in_WD, start_BT, contexts[0], **options)
            h_BTF = nn.relu(jnp.einsum("BTD,DF->BTF", y_BTD, in_DF) + in_F[None, None])
            # As in FeedForward: only the sum of the second product crosses `tensor`.
            h_BTF = constrain(h_BTF, "batch", None, "mlp")
            h_BTF = dropout(h_BTF, self.dropout, keys[0])
            y_BTF = depthwise(h_BTF, out_WF, start_BT, contexts[1], **options)
            y_BTD = jnp.einsum("BTF,FD->BTD", y_BTF, out_FD) + out_D[None, None]
            return dropout(y_BTD, self.dropout, keys[1]), (x_BTD, h_BTF)

    def _depthwise(self, name, W, F):
        # Outputs as large as inputs: W independent terms.
        init = nn.initializers.normal(W**-0.5)
        return self.param(name, init, (W, F)).astype(self.dtype)

    def _pointwise(self, name, D, F):
        kernel_DF = self.param(f"{name}_kernel", self.kernel_init, (D, F))
        bias_F = self.param(f"{name}_bias", nn.initializers.zeros, (F,))
        return kernel_DF.astype(self.dtype), bias_F.astype(self.dtype)
