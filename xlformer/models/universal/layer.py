"""One layer of the Universal Transformer, which all steps share."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from xlformer.kernels.dropout import fold
from xlformer.layers import memory as memory_lib
from xlformer.layers.attention import Attention
from xlformer.layers.feed_forward import FeedForward, LayerNorm
from xlformer.layers.separable import SeparableNetwork
from xlformer.models.universal.config import UniversalConfig
from xlformer.sharding import constrain


class Layer(nn.Module):
    """Attention over [memory; x], then the transition; pre- or post-norm."""

    config: UniversalConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD, memory_BMD, contexts, segment, key=None):
        """The layer's output, and the inputs of its convolutions.

        Args:
          x_BTD: the layer's input, with the signals of its step.
          memory_BMD: the same at the positions before.
          contexts: the inputs of the convolutions there; () where none are carried.
          segment: what it may see (trunk.Segment).
          key: of dropout.
        """
        config = self.config
        keys = [fold(key, i) for i in range(4)]
        norm = functools.partial(LayerNorm, epsilon=config.norm_epsilon)
        attention_norm, transition_norm = norm(name="attention_norm"), norm(name="norm")
        M = memory_BMD.shape[1]
        # A masked NaN would still spoil the sum over values: see layers/memory.py.
        context_BSD, bad_BS = memory_lib.finite(
            jnp.concatenate([memory_BMD, x_BTD], 1)
        )
        if config.pre_norm:
            # Memory is stored as it was and normalised at use, as in Transformer-XL.
            context_BSD = attention_norm(context_BSD)
        more_BTD, _ = self._attention()(
            context_BSD[:, M:],
            context_BSD,
            segment.visibility,
            r_SD=segment.r_SD,
            keys=keys[:2],
            # Without a norm of its own in between, the memory has nothing to learn.
            fixed=0 if config.pre_norm else M,
        )
        # A query that does see such a vector gives NaN, as if nothing were hidden.
        seen_BT = segment.visibility.sees(bad_BS, x_BTD.shape[1])
        y_BTD = x_BTD + jnp.where(seen_BT[..., None], jnp.nan, more_BTD)
        y_BTD = y_BTD if config.pre_norm else attention_norm(y_BTD)
        z_BTD = transition_norm(y_BTD) if config.pre_norm else y_BTD
        more_BTD, inputs = self._transition(z_BTD, contexts, segment, keys[2:])
        y_BTD = y_BTD + more_BTD
        y_BTD = y_BTD if config.pre_norm else transition_norm(y_BTD)
        return constrain(y_BTD, "batch", None, None), inputs

    def _attention(self):
        config = self.config
        return Attention(
            n_head=config.n_head,
            d_head=config.head_width,
            attn_type=config.encoding,
            own_biases=True,
            table_length=0,
            clamp_length=0,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            kernel_init=nn.initializers.normal(config.std),
            dtype=self.dtype,
            implementation=config.attention,
            name="attention",
        )

    def _transition(self, x_BTD, contexts, segment, keys):
        config = self.config
        options = {
            "d_inner": config.d_inner,
            "dropout": config.dropout,
            "kernel_init": nn.initializers.normal(config.std),
            "dtype": self.dtype,
        }
        if config.transition == "fc":
            return FeedForward(**options, name="feed_forward")(x_BTD, keys), ()
        network = SeparableNetwork(**options, causal=config.causal, name="separable")
        contexts = contexts or (None, None)
        return network(x_BTD, segment.start_BT, contexts, keys)
