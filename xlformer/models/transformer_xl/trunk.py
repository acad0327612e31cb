"""The stack of layers of Transformer-XL with its memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xlformer.kernels.dropout import dropout, fold
from xlformer.kernels.visibility import Visibility
from xlformer.layers import memory as memory_lib
from xlformer.layers import positions, stack
from xlformer.layers.attention import LEARNED_ABSOLUTE, RELATIVE, ROTARY, SINUSOID
from xlformer.layers.feed_forward import LayerNorm
from xlformer.layers.memory import Memory
from xlformer.models.base import Aux
from xlformer.models.transformer_xl import cache as cache_lib
from xlformer.models.transformer_xl.config import TransformerXLConfig
from xlformer.models.transformer_xl.layer import Layer, initializers
from xlformer.sharding import constrain

# Which number is folded into the dropout key for what. If they changed, a run resumed
# with a new release would not drop what it would have dropped with the old one.
INPUT_KEY, POSITION_KEY, OUTPUT_KEY, LAYERS_KEY = range(4)


class Segment(NamedTuple):
    """What every layer has to know of a segment.

    Attributes:
      resets_BT: true where a token sees nothing before it; or None.
      visibility: what each token sees of [memory; segment].
      index_BT: position of each token, counted backwards from the last valid one.
      end: how many of its positions enter the memory: a number, or one a row.
      shared: (r_SD, (u, v)) for all layers; see Layer.
      key: of the layers' dropout; None switches it off.
    """

    resets_BT: Any
    visibility: Visibility
    index_BT: Any
    end: Any
    shared: Any
    key: Any


class TrunkModule(nn.Module):
    """The trunk of models.tokens: parameters are stacked [L, ...]."""

    config: TransformerXLConfig
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
    ):
        del step  # No schedule inside this model.
        config, M = self.config, self.config.memory_length
        B, T, _ = x_BTD.shape
        cached = not isinstance(state, Memory)
        if cached:
            cache_lib.check_call(state, T, lengths, train)
        # None where no key can be hidden: then the mask is a constant of the program.
        key_start_BT = None
        if not config.attend_zero_memory and (M or resets_BT is not None):
            key_start_BT = memory_lib.key_start(state.length_B, resets_BT, M=M, T=T)
        # The last extended_length inputs come again with the next segment, so they stay
        # out of the memory. The original swaps two arguments there (its issues 59, 96
        # and 118), and keeps the wrong positions where ext_len is not 0.
        if lengths is None:
            end = max(0, T - config.extended_length)
        else:
            end = jnp.maximum(0, lengths - config.extended_length)
            x_BTD = jnp.where(_valid(x_BTD, lengths), x_BTD, 0)
        index_BT = _backward_index(B, T, lengths)
        x_BTD = self._add_sinusoid(x_BTD, index_BT)
        # Dropout comes before the first layer, so the memory caches vectors after
        # dropout, as in the original. All rows share the sinusoids and their one mask.
        shared_key, key = (None, None) if keys is None else keys
        x_BTD = dropout(x_BTD, config.dropout, fold(key, INPUT_KEY))
        segment = Segment(
            resets_BT,
            config.visibility(key_start_BT),
            index_BT,
            end,
            self._shared(M + T, fold(shared_key, POSITION_KEY)),
            fold(key, LAYERS_KEY),
        )
        layers = self._cached_layers if cached else self._plain_layers
        y_BTD, state = layers(x_BTD, state, segment)
        # The original's pre-norm lacks this one, and so does the default.
        if config.final_norm:
            scale_init = initializers(config)["norm_scale"]
            norm = LayerNorm(config.norm_epsilon, scale_init, name="final_norm")
            y_BTD = norm(y_BTD)
        if not config.attend_zero_memory:
            length_B = memory_lib.next_length(state.length_B, resets_BT, end, M=M)
            state = state._replace(length_B=length_B)
        return (
            dropout(y_BTD, config.dropout, fold(key, OUTPUT_KEY)),
            state,
            Aux(0.0, {}),
        )

    def _plain_layers(self, x_BTD, state: Memory, segment: Segment):
        """Each layer reads its memory and keeps its last inputs: (output, Memory)."""
        # Not a submodule (parent=None): the parameters of all layers are stacked, and
        # stack.run, which scans or unrolls, applies it to those of one at a time.
        config, layer = self.config, Layer(self.config, self.dtype, parent=None)
        parameters = self._parameters(layer, x_BTD, segment.shared)
        hidden_LBMD = state.hidden_LBMD.astype(self.dtype)
        if config.attend_zero_memory:
            hidden_LBMD = _zero_rows(hidden_LBMD, segment.resets_BT)

        def run_layer(x_BTD, part):
            (params, table_ND, index), memory_BMD = part
            x_BTD = self._add_positions(x_BTD, table_ND, segment.index_BT)
            # The layer's key is folded by its number: scanned and unrolled layers drop
            # the same units.
            y_BTD, _ = layer.apply(
                {"params": params},
                x_BTD,
                memory_BMD,
                segment.shared,
                segment.visibility,
                fold(segment.key, index),
            )
            return y_BTD, memory_lib.append(memory_BMD, x_BTD, segment.end)

        y_BTD, hidden_LBMD = self._run(run_layer, x_BTD, (parameters, hidden_LBMD))
        return y_BTD, state._replace(hidden_LBMD=hidden_LBMD)

    def _cached_layers(self, x_BTD, state, segment: Segment):
        """Runs the layers over cached keys and values: (output, the new cache)."""
        config, layer = self.config, Layer(self.config, self.dtype, parent=None)
        parameters = self._parameters(layer, x_BTD, segment.shared)
        state = cache_lib.after_resets(config, parameters[0], state, segment.resets_BT)
        carried, split = state.scanned()

        def run_layer(carry, part):
            x_BTD, carried = carry
            (params, table_ND, index), mine = part
            x_BTD = self._add_positions(x_BTD, table_ND, segment.index_BT)
            attend = state.attend(
                carried,
                mine,
                index,
                visibility=segment.visibility,
                end=segment.end,
                rotary=config.encoding == ROTARY,
                implementation=config.attention,
            )
            y_BTD, (carried, mine) = layer.apply(
                {"params": params},
                x_BTD,
                None,
                segment.shared,
                segment.visibility,
                attend=attend,
            )
            return (y_BTD, carried), mine

        carry, split = self._run(run_layer, (x_BTD, carried), (parameters, split))
        y_BTD, carried = carry
        return y_BTD, state.after(carried, split)

    def _run(self, run_layer, carry, stacked):
        options = {"scan": self.config.scan_layers, "remat": self.config.remat}
        return stack.run(run_layer, carry, stacked, **options)

    def _parameters(self, layer, x_BTD, shared):
        """(parameters, learned positions or None, number), stacked by layer."""
        config = self.config
        # Even where the parameters exist, `param` would trace the whole initialisation
        # to compare shapes: a third of the time that tracing a model takes.
        params = self.get_variable("params", "layers")
        if params is None:
            params = self.param("layers", self._init_layers, layer, x_BTD, shared)
        tables_LND = None
        if config.encoding == LEARNED_ABSOLUTE:
            shape = (config.n_layer, config.table_length, x_BTD.shape[-1])
            tables_LND = self.param("position", initializers(config)["kernel"], shape)
        return params, tables_LND, jnp.arange(config.n_layer)

    def _init_layers(self, key, layer, x_BTD, shared):
        """One layer's initialisation, mapped over the layers' keys."""
        r_SD, biases = shared
        # One token without memory: shapes of parameters depend on neither.
        one_BTD = x_BTD[:1, :1]
        shared = (None if r_SD is None else r_SD[:1], biases)

        def init_one(key):
            arrays = one_BTD, one_BTD[:, :0], shared, self.config.visibility()
            return layer.init(key, *arrays)["params"]

        return jax.vmap(init_one)(jax.random.split(key, self.config.n_layer))

    def _add_sinusoid(self, x_BTD, index_BT):
        """Type 2: one sinusoid on the input; the last token is position 0."""
        if self.config.encoding != SINUSOID:
            return x_BTD
        if self.config.clamp_length > 0:
            index_BT = jnp.minimum(index_BT, self.config.clamp_length)
        table_TD = positions.sinusoid(
            np.arange(x_BTD.shape[1]), x_BTD.shape[-1], self.dtype
        )
        return x_BTD + table_TD[index_BT]

    def _add_positions(self, x_BTD, table_ND, index_BT):
        """Type 3: learned positions, added to the input of each layer.

        The table is right-aligned; what lies beyond it uses its first row.
        """
        if table_ND is None:
            return x_BTD
        rows_BT = jnp.maximum(self.config.table_length - 1 - index_BT, 0)
        # Whole on every device: rows of a batch that is split look it up, which XLA's
        # partitioner (jax 0.10.2) cannot do in a table that is split another way.
        table_ND = constrain(table_ND.astype(self.dtype), None, None)
        return x_BTD + table_ND[rows_BT]

    def _shared(self, S, key):
        """What all layers use: the sinusoid of the distances, and u and v if tied."""
        config = self.config
        if config.encoding != RELATIVE:
            return None, None
        clamped = positions.distances(S, config.clamp_length)
        r_SD = positions.sinusoid(clamped, config.d_model, self.dtype)
        # On the sinusoids, before any projection: all layers share one mask.
        r_SD = dropout(r_SD, config.dropout, key)
        if config.untie_r:
            return r_SD, None
        shape = config.n_head, config.head_width
        kernel = initializers(config)["kernel"]
        return r_SD, tuple(self.param(name, kernel, shape) for name in "uv")


def _backward_index(B, T, lengths):
    """Absolute positions count backwards: 0 is the last valid token of the row."""
    index_BT = jnp.broadcast_to(T - 1 - jnp.arange(T)[None], (B, T))
    if lengths is None:
        return index_BT
    padding_B = T - jnp.broadcast_to(lengths, (B,))
    return jnp.maximum(index_BT - padding_B[:, None], 0)


def _valid(x_BTD, lengths):
    B, T, _ = x_BTD.shape
    lengths_B = jnp.broadcast_to(lengths, (B,))
    return (jnp.arange(T)[None] < lengths_B[:, None])[..., None]


def _zero_rows(hidden_LBMD, resets_BT):
    if resets_BT is None:
        return hidden_LBMD
    return jnp.where(resets_BT[None, :, :1, None], 0, hidden_LBMD)
