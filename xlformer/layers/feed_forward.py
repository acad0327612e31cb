"""Layer normalisation and the position-wise networks."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlformer.kernels.dropout import dropout
from xlformer.sharding import constrain

# Logical axes of the parameters: see models.parameters.param_axes.
PARAM_AXES = {
    "feed_forward/in_kernel": ("embed", "mlp"),
    "feed_forward/in_bias": ("mlp",),
    "feed_forward/out_kernel": ("mlp", "embed"),
    # All chunks of a unit on one device: their sum crosses no axis.
    "boom/kernel": ("embed", None, "mlp"),
    "boom/bias": (None, "mlp"),
}
# The two sides of the matrices among them: see models.sides.
MATRICES = {
    "feed_forward/in_kernel": ((0,), (1,)),
    "feed_forward/out_kernel": ((0,), (1,)),
    "boom/kernel": ((0,), (1, 2)),
}


def layer_norm(x: jax.Array, scale_D, bias_D, epsilon: float) -> jax.Array:
    """Normalises the last axis, with statistics in at least float32.

    epsilon is added to the variance. It has no default: the PyTorch original has 1e-5,
    the TensorFlow original 1e-12, Flax 1e-6, and where embeddings are small that moves
    the nll by 2e-3.
    """
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = exact.mean(-1, keepdims=True)
    # Squared differences, because E[x^2] - E[x]^2 cancels where the mean is large.
    variance = jnp.square(exact - mean).mean(-1, keepdims=True)
    normal = (exact - mean) * jax.lax.rsqrt(variance + epsilon)
    row = (1,) * (x.ndim - 1) + (-1,)
    return (normal * scale_D.reshape(row) + bias_D.reshape(row)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation with its two parameters, `scale` and `bias`."""

    epsilon: float
    scale_init: Any = nn.initializers.ones

    @nn.compact
    def __call__(self, x):
        scale_D = self.param("scale", self.scale_init, (x.shape[-1],))
        bias_D = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale_D, bias_D, self.epsilon)


def boom(x_BTD, kernel_DCN, bias_CN, rate: float = 0.0, key=None) -> jax.Array:
    """The sum of C chunks of GELU(x W + b), each as wide as the result (Merity 2019).

    As GELU(x W + b) W2 with W2 = [I I ... I], which is neither stored nor learned. GELU
    is z sigmoid(1.702 z), an approximation (Hendrycks & Gimpel 2016). rate and key are
    of dropout of the chunks' units.
    """
    with jax.named_scope("boom"):
        z_BTCN = jnp.einsum("BTD,DCN->BTCN", x_BTD, kernel_DCN) + bias_CN[None, None]
        z_BTCN = constrain(z_BTCN, "batch", None, None, "mlp")
        h_BTCN = dropout(z_BTCN * nn.sigmoid(1.702 * z_BTCN), rate, key)
        return h_BTCN.sum(2)


class FeedForward(nn.Module):
    """relu(x W1 + b1) W2 + b2, with dropout on the hidden units and on the output."""

    d_inner: int
    dropout: float
    kernel_init: Any
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD, keys=(None, None)):
        D, F = x_BTD.shape[-1], self.d_inner
        in_DF = self.param("in_kernel", self.kernel_init, (D, F)).astype(self.dtype)
        in_F = self.param("in_bias", nn.initializers.zeros, (F,)).astype(self.dtype)
        out_FD = self.param("out_kernel", self.kernel_init, (F, D)).astype(self.dtype)
        out_D = self.param("out_bias", nn.initializers.zeros, (D,)).astype(self.dtype)
        with jax.named_scope("feed_forward"):
            h_BTF = nn.relu(jnp.einsum("BTD,DF->BTF", x_BTD, in_DF) + in_F[None, None])
            # Split over `tensor` here, so that the second product is a partial sum and
            # one sum of y is all that crosses that axis (Shoeybi et al. 2019).
            h_BTF = constrain(h_BTF, "batch", None, "mlp")
            h_BTF = dropout(h_BTF, self.dropout, keys[0])
            y_BTD = jnp.einsum("BTF,FD->BTD", h_BTF, out_FD) + out_D[None, None]
            return dropout(y_BTD, self.dropout, keys[1])
