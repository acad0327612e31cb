"""The layers of the vanilla Transformer, each with positions of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlformer.errors import UserError
from xlformer.kernels.dropout import fold
from xlformer.kernels.visibility import Visibility
from xlformer.layers import memory as memory_lib
from xlformer.layers import stack
from xlformer.layers.attention import LEARNED_ABSOLUTE, Attention
from xlformer.layers.feed_forward import FeedForward, LayerNorm
from xlformer.models.base import Aux
from xlformer.models.vanilla.config import VanillaConfig
from xlformer.sharding import constrain


class Readout(NamedTuple):
    """What is asked of every layer's output on the way.

    Attributes:
      read: (y_BTD, its part of stacked) -> what is kept of it.
      stacked: arrays [L, ...] for it.
    """

    read: Any
    stacked: Any


class Layer(nn.Module):
    """Attention and the feed-forward network, each with residual and then a norm."""

    config: VanillaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD, visibility: Visibility, key=None):
        config = self.config
        kernel = nn.initializers.normal(config.init_std)
        attention = Attention(
            n_head=config.n_head,
            d_head=config.head_width,
            attn_type=LEARNED_ABSOLUTE,  # positions are in its input
            own_biases=False,
            table_length=0,
            clamp_length=0,
            dropout=0.0,
            attention_dropout=config.attention_dropout,
            kernel_init=kernel,
            dtype=self.dtype,
            implementation=config.attention,
            output_bias=config.attention_bias,
            qkv_bias=config.attention_bias,
            name="attention",
        )
        network = FeedForward(
            config.d_inner, config.dropout, kernel, self.dtype, name="feed_forward"
        )
        # A masked NaN would still spoil the sum over values: see layers/memory.py.
        seen_BTD, bad_BT = memory_lib.finite(x_BTD)
        more_BTD, _ = attention(
            seen_BTD, seen_BTD, visibility, keys=(fold(key, 0), None)
        )
        # A query that does see such a vector gives NaN, as if nothing were hidden.
        sees_BT = visibility.sees(bad_BT, x_BTD.shape[1])
        y_BTD = x_BTD + jnp.where(sees_BT[..., None], jnp.nan, more_BTD)
        y_BTD = LayerNorm(config.norm_epsilon, name="attention_norm")(y_BTD)
        # Hidden units are dropped, outputs of sub-layers are not.
        y_BTD = y_BTD + network(y_BTD, (fold(key, 1), None))
        y_BTD = LayerNorm(config.norm_epsilon, name="norm")(y_BTD)
        return constrain(y_BTD, "batch", None, None)


class TrunkModule(nn.Module):
    """The trunk of models.tokens: parameters are stacked [L, ...].

    With a `readout` it returns what that keeps, stacked, in the place of Aux.
    """

    config: VanillaConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BTD,
        state,
        *,
        resets_BT=None,
        lengths=None,
        step=None,
        train=False,
        keys=None,
        readout: Readout | None = None,
    ):
        del step, train  # `keys` says what is dropped, `readout` what is asked.
        config, (B, T, _) = self.config, x_BTD.shape
        if T > config.context_length:
            raise UserError(
                f"a segment of {T} tokens, but config.model.context_length="
                f"{config.context_length}: learned positions end there"
            )
        if lengths is not None:
            valid_BT = jnp.arange(T)[None] < jnp.broadcast_to(lengths, (B,))[:, None]
            x_BTD = jnp.where(valid_BT[..., None], x_BTD, 0)
        start_BT = None
        if resets_BT is not None:
            start_BT = memory_lib.key_start(
                jnp.zeros(B, jnp.int32), resets_BT, M=0, T=T
            )
        # Not a submodule (parent=None): the parameters of all layers are stacked.
        layer = Layer(config, self.dtype, parent=None)
        visibility = config.visibility(start_BT)
        key = None if keys is None else keys.rows_B

        def run_layer(x_BTD, part):
            params, table_ND, index, asked = part
            # Gathered as it is used: every device adds whole rows.
            table_ND = constrain(table_ND.astype(self.dtype), None, None)
            x_BTD = x_BTD + _positions(table_ND, T, start_BT)
            y_BTD = layer.apply({"params": params}, x_BTD, visibility, fold(key, index))
            return y_BTD, readout.read(y_BTD, asked) if readout else None

        stacked = (
            self._layers(layer, x_BTD),
            self._tables(),
            jnp.arange(config.n_layer),
            readout.stacked if readout else None,
        )
        y_BTD, kept = stack.run(
            run_layer, x_BTD, stacked, scan=config.scan_layers, remat=config.remat
        )
        return y_BTD, state, kept if readout else Aux(0.0, {})

    def _layers(self, layer, x_BTD):
        # Even where the parameters exist, `param` would trace the initialisation.
        params = self.get_variable("params", "layers")
        if params is not None:
            return params

        def init(key):
            def init_one(key):
                arguments = x_BTD[:1, :1], self.config.visibility()
                return layer.init(key, *arguments)["params"]

            return jax.vmap(init_one)(jax.random.split(key, self.config.n_layer))

        return self.param("layers", init)

    def _tables(self):
        config = self.config
        shape = config.n_layer, config.context_length, config.d_model
        return self.param("position", nn.initializers.normal(config.init_std), shape)


def _positions(table_ND, T: int, start_BT):
    """Rows of a layer's table, counted from the segment's start or the last reset."""
    if start_BT is None:
        return table_ND[None, :T]
    return table_ND[jnp.arange(T)[None] - start_BT]
