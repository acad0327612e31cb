"""A trunk of one's own between embedding and softmax: h_t = tanh(x_t + w h_t-1)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from xlformer.fields import REFUSED, Rule
from xlformer.models import Aux
from xlformer.models.tokens import TokenModel


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    vocab_size: int = 19
    d_model: int = 5

    RULES = {"vocab_size": Rule(REFUSED), "d_model": Rule(REFUSED, least=1)}

    def tiny(self):
        return dataclasses.replace(self, d_model=3)


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x_BTD, state_BD, *, resets_BT, lengths, step, train, keys):
        del step, train, keys
        B, T, D = x_BTD.shape
        weights_DD = self.param("weights", nn.initializers.normal(), (D, D))

        def body(h_BD, column):
            x_BD, reset_B, valid_B = column
            before_BD = jnp.where(reset_B[:, None], 0, h_BD)
            new_BD = jnp.tanh(x_BD + before_BD @ weights_DD)
            h_BD = jnp.where(valid_B[:, None], new_BD, h_BD)
            return h_BD, h_BD

        if resets_BT is None:
            resets_BT = jnp.zeros((B, T), bool)
        lengths_B = jnp.broadcast_to(T if lengths is None else lengths, (B,))
        valid_BT = jnp.arange(T)[None] < lengths_B[:, None]
        columns = x_BTD.swapaxes(0, 1), resets_BT.T, valid_BT.T
        state_BD, y_TBD = lax.scan(body, state_BD, columns)
        return y_TBD.swapaxes(0, 1), state_BD, Aux(0.0, {})


class Recurrent(TokenModel):
    Config = RecurrentConfig

    def trunk_module(self, dtype):
        return Cell()

    def init_state(self, batch_size, dtype=None):
        return jnp.zeros((batch_size, self.width), dtype or self.dtype())

    def state_axes(self):
        return ("batch", "embed")
