"""A gate for a residual sum (GTrXL; Parisotto et al. 2019, arXiv:1910.06764)."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlformer.kernels import watching
from xlformer.sharding import constrain

NONE, GRU = GATES = ("none", "gru")
# What the bias begins with. Above 0 it keeps a fresh layer near the identity: the new
# value enters with a weight of about sigmoid(-2) = 0.12.
BIAS = 2.0
# Logical axes of the parameters: see models.parameters.param_axes.
PARAM_AXES = {
    f"{module}/{name}": names
    for module in ("attention_gate", "feed_forward_gate")
    for name, names in (
        ("new_kernel", ("embed", None, "mlp")),
        ("residual_kernel", ("embed", None, "mlp")),
        ("reset_kernel", ("embed", "mlp")),
        ("bias", (None,)),
    )
}
# The two sides of the six matrices: see models.sides.
MATRICES = {
    f"{module}/{name}": sides
    for module in ("attention_gate", "feed_forward_gate")
    for name, sides in (
        ("new_kernel", ((0,), (2,))),
        ("residual_kernel", ((0,), (2,))),
        ("reset_kernel", ((0,), (1,))),
    )
}


class Weights(NamedTuple):
    """The six matrices of a gate, [in, out], and its one bias.

    Attributes:
      new_DCE: W of the sub-layer's output, for r, z and h.
      residual_DCE: U of the residual, for r and z.
      reset_DE: U of the residual that r lets through, for h.
      bias_E: subtracted from z.
    """

    new_DCE: Any
    residual_DCE: Any
    reset_DE: Any
    bias_E: Any


def gru(x_BTD: jax.Array, y_BTD: jax.Array, weights: Weights, name="") -> jax.Array:
    """(1 - z) x + z h, of the residual x and a sub-layer's output y.

    r = s(W_r y + U_r x), z = s(W_z y + U_z x - b), h = tanh(W_h y + U_h (r x)); the
    sigmoid s. A large b is the identity (section 3.2 there). name: for who watches.
    """
    with jax.named_scope("gate"):
        new_BTCE = jnp.einsum("BTD,DCE->BTCE", y_BTD, weights.new_DCE)
        old_BTCE = jnp.einsum("BTD,DCE->BTCE", x_BTD, weights.residual_DCE)
        # Split over `tensor` by what they give; the residual is whole on every device,
        # so that what r lets through of it is gathered, and the result.
        new_BTCE, old_BTCE = (
            constrain(x, "batch", None, None, "mlp") for x in (new_BTCE, old_BTCE)
        )
        r_BTE = nn.sigmoid(new_BTCE[:, :, 0] + old_BTCE[:, :, 0])
        bias_BTE = weights.bias_E[None, None]
        z_BTE = nn.sigmoid(new_BTCE[:, :, 1] + old_BTCE[:, :, 1] - bias_BTE)
        watching.tell(lambda: watching.Gate(z_BTE.mean(), z_BTE.mean((0, 1))), name)
        through_BTD = constrain(r_BTE * x_BTD, "batch", None, None)
        held_BTE = jnp.einsum("BTD,DE->BTE", through_BTD, weights.reset_DE)
        h_BTE = jnp.tanh(new_BTCE[:, :, 2] + held_BTE)
        return constrain((1 - z_BTE) * x_BTD + z_BTE * h_BTE, "batch", None, None)


class GRUGate(nn.Module):
    """`gru` with its parameters."""

    kernel_init: Any
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD, y_BTD):
        D, init = x_BTD.shape[-1], self.kernel_init
        parameters = (
            self.param("new_kernel", init, (D, 3, D)),
            self.param("residual_kernel", init, (D, 2, D)),
            self.param("reset_kernel", init, (D, D)),
            self.param("bias", nn.initializers.constant(BIAS), (D,)),
        )
        weights = Weights(*(p.astype(self.dtype) for p in parameters))
        return gru(x_BTD, y_BTD, weights, self.name or "")
