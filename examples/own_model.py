"""A language model of your own: all that xlformer has to know of it is in one class."""

import dataclasses

import jax
import jax.numpy as jnp

from xlformer.kernels.dropout import dropout
from xlformer.layers.memory import expand_resets
from xlformer.models import Aux, Model


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int
    width: int = 64
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Gated(Model):
    """The minimal gated unit (Zhou et al. 2016); its state is one vector a row."""

    def init(self, key):
        V, D = self.config.vocab_size, self.config.width
        shapes = {"table_VD": (V, D), "gate_ED": (2 * D, D), "new_ED": (2 * D, D)}
        keys = dict(zip(shapes, jax.random.split(key, 3), strict=True))
        return {name: D**-0.5 * jax.random.normal(keys[name], shape, jnp.float32)
                for name, shape in shapes.items()}  # fmt: skip

    def init_state(self, batch_size, dtype=None):
        return jnp.zeros((batch_size, self.config.width), dtype or jnp.float32)

    def state_axes(self):
        return ("batch", None)

    def apply(self, params, inputs_BT, targets_BT, state, *, resets_BT=None,
              lengths_B=None, step=None, train=False, rngs=None):  # fmt: skip
        keys_B = rngs["rows"] if train and self.config.dropout else None
        log_p_BTV, state, valid_BT = self._forward(
            params, inputs_BT, state, resets_BT, lengths_B, keys_B
        )
        nll_BT = -jnp.take_along_axis(log_p_BTV, targets_BT[..., None], 2)[..., 0]
        return jnp.where(valid_BT, nll_BT, 0), state, Aux(0.0, {})

    def log_probs(self, params, inputs_BT, state, *, resets_BT=None, lengths_B=None,
                  step=None):  # fmt: skip
        return self._forward(params, inputs_BT, state, resets_BT, lengths_B)[:2]

    def _forward(self, params, inputs_BT, state, resets_BT, lengths_B, keys_B=None):
        B, T = inputs_BT.shape
        resets_BT = jnp.zeros((B, T), bool) if resets_BT is None else resets_BT
        lengths_B = jnp.broadcast_to(T if lengths_B is None else lengths_B, (B,))
        valid_BT = jnp.arange(T)[None] < lengths_B[:, None]
        x_BTD = dropout(params["table_VD"][inputs_BT], self.config.dropout, keys_B)

        def one(h_BD, token):
            x_BD, reset_B, valid_B = token
            old_BD = jnp.where(reset_B[:, None], 0, h_BD)
            gate_BD = jax.nn.sigmoid(jnp.hstack([x_BD, old_BD]) @ params["gate_ED"])
            new_BD = jnp.tanh(jnp.hstack([x_BD, gate_BD * old_BD]) @ params["new_ED"])
            new_BD = old_BD + gate_BD * (new_BD - old_BD)
            h_BD = jnp.where(valid_B[:, None], new_BD, h_BD)
            return h_BD, h_BD

        tokens = jnp.swapaxes(x_BTD, 0, 1), expand_resets(resets_BT, T).T, valid_BT.T
        state, h_TBD = jax.lax.scan(one, jax.lax.stop_gradient(state), tokens)
        log_p_BTV = jax.nn.log_softmax(jnp.swapaxes(h_TBD, 0, 1) @ params["table_VD"].T)
        return log_p_BTV, jax.lax.stop_gradient(state), valid_BT
