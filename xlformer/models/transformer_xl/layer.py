"""One layer of Transformer-XL, and how its parameters begin."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlformer.kernels.dropout import fold
from xlformer.layers import memory as memory_lib
from xlformer.layers.attention import Attention
from xlformer.layers.feed_forward import FeedForward, LayerNorm
from xlformer.layers.gating import GRUGate
from xlformer.models.transformer_xl.config import TransformerXLConfig
from xlformer.sharding import constrain


def initializers(config: TransformerXLConfig) -> dict[str, Any]:
    """Initialisers by role, as in the PyTorch original or in the TensorFlow original.

    They differ twice: the gains of norms are N(1, init_std) in PyTorch and 1 in
    TensorFlow, and the softmax's vectors of tail bins are N(0, init_std) and 0.
    """
    normal = nn.initializers.normal
    if config.init == "uniform":
        low, high = -config.init_range, config.init_range

        def kernel(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, low, high)
    else:
        kernel = normal(config.init_std)

    def norm_scale(key, shape, dtype=jnp.float32):
        return 1 + normal(config.init_std)(key, shape, dtype)

    tensorflow = config.init_scheme == "tensorflow"
    return {
        "kernel": kernel,
        "projection": normal(config.proj_init_std),
        "norm_scale": nn.initializers.ones if tensorflow else norm_scale,
        "cluster": nn.initializers.zeros if tensorflow else kernel,
    }


class Layer(nn.Module):
    """Attention over [memory; x], then the feed-forward network, with sums or gates."""

    config: TransformerXLConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD, memory_BMD, shared, visibility, key=None, attend=None):
        """The layer's output, and what `attend` keeps.

        Args:
          x_BTD: the layer's input.
          memory_BMD: its memory; None where `attend` brings its own.
          shared: (r_SD, (u, v)), the same for all layers.
          visibility: what each query sees of [memory; x].
          key: of dropout.
          attend: see Attention.
        """
        config = self.config
        # For probabilities, attention's output, hidden units and their output. In
        # another order a resumed run would drop other units than before.
        keys = [fold(key, i) for i in range(4)]
        attention, network, attention_norm, feed_forward_norm = self._modules()
        r_SD, biases = shared
        M, context_BSD = 0, x_BTD
        if not attend:
            M = memory_BMD.shape[1]
            context_BSD = jnp.concatenate([memory_BMD, x_BTD], 1)
            # A masked NaN would still spoil the sum over values: see layers/memory.py.
            context_BSD, bad_BS = memory_lib.finite(context_BSD)
        queries_BTD = context_BSD[:, M:]
        if config.norm_first:
            # Memory is stored as it was and normalised at use, by the same norm, as in
            # the original (pre_lnorm).
            context_BSD = attention_norm(context_BSD)
            # The original's absolute types make their queries of what has no norm.
            if config.norm_queries:
                queries_BTD = context_BSD[:, M:]
        more_BTD, kept = attention(
            queries_BTD,
            context_BSD,
            visibility,
            r_SD=r_SD,
            biases=biases,
            keys=keys[:2],
            attend=attend,
            # The memory passes no gradient on, but with pre-norm there is a norm before
            # the projection, whose scale and bias learn from all S positions.
            fixed=0 if config.norm_first else M,
        )
        if not attend:
            # A query that does see such a vector gives NaN, as if nothing were hidden.
            seen_BT = visibility.sees(bad_BS, x_BTD.shape[1])
            more_BTD = jnp.where(seen_BT[..., None], jnp.nan, more_BTD)
        y_BTD = self._joined(x_BTD, more_BTD, "attention_gate")
        if config.norm_first:
            more_BTD = network(feed_forward_norm(y_BTD), keys[2:])
            y_BTD = self._joined(y_BTD, more_BTD, "feed_forward_gate")
        else:
            y_BTD = attention_norm(y_BTD)
            y_BTD = feed_forward_norm(y_BTD + network(y_BTD, keys[2:]))
        return constrain(y_BTD, "batch", None, None), kept

    def _joined(self, x_BTD, more_BTD, name):
        """A residual and its sub-layer's output: their sum, or a gate of both."""
        if not self.config.gated:
            return x_BTD + more_BTD
        gate = GRUGate(initializers(self.config)["kernel"], self.dtype, name=name)
        return gate(x_BTD, nn.relu(more_BTD))

    def _modules(self):
        """Attention, the feed-forward network, and the norm of each."""
        config, init = self.config, initializers(self.config)
        attention = Attention(
            n_head=config.n_head,
            d_head=config.head_width,
            attn_type=config.encoding,
            own_biases=config.untie_r,
            table_length=config.table_length,
            clamp_length=config.clamp_length,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            kernel_init=init["kernel"],
            dtype=self.dtype,
            implementation=config.attention,
            # What a ReLU follows has a threshold of its own, as in feed-forward.
            output_bias=config.gated,
            name="attention",
        )
        network = FeedForward(
            d_inner=config.d_inner,
            dropout=config.dropout,
            kernel_init=init["kernel"],
            dtype=self.dtype,
            name="feed_forward",
        )
        norm = functools.partial(
            LayerNorm, epsilon=config.norm_epsilon, scale_init=init["norm_scale"]
        )
        return attention, network, norm(name="attention_norm"), norm(name="norm")
