"""Transformer-XL (Dai et al. 2019, arXiv:1901.02860).

Layer inputs of the last memory_length positions are cached, without gradient, and
attended together with the segment; positions enter as distances. Post-norm, all of
the original's options, and the counter-examples that its paper compares with.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xlformer.kernels.case import OUTPUT_NAME
from xlformer.kernels.dropout import dropout, fold
from xlformer.layers import adaptive, attention, feed_forward, positions
from xlformer.layers import memory as memory_lib
from xlformer.layers.adaptive import AdaptiveEmbedding, AdaptiveSoftmax, Bins
from xlformer.layers.attention import LEARNED_ABSOLUTE, RELATIVE, ROTARY, SINUSOID
from xlformer.layers.cache import Ring
from xlformer.layers.feed_forward import LayerNorm
from xlformer.layers.memory import Memory
from xlformer.models import transformer_xl_cache
from xlformer.models.base import Model, compute_dtype, param_axes
from xlformer.models.transformer_xl_config import TransformerXLConfig
from xlformer.models.transformer_xl_layer import Layer, initializers
from xlformer.sharding import constrain

# Which number is folded into the dropout key for what, beside the layers.
INPUT_KEY, POSITION_KEY, OUTPUT_KEY, LAYERS_KEY = range(4)


class TrunkModule(nn.Module):
    """The stack of layers with its memory: parameters stacked [L, ...], one scan."""

    config: TransformerXLConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD, state, *, resets_BT=None, lengths=None, keys=None):
        config = self.config
        B, T, _ = x_BTD.shape
        M = config.memory_length
        key_start_BT = None
        if not config.attend_zero_memory and (M or resets_BT is not None):
            key_start_BT = memory_lib.key_start(state.length_B, resets_BT, M=M, T=T)
        # The last extended_length inputs come again with the next segment.
        if lengths is None:
            end = max(0, T - config.extended_length)
        else:
            end = jnp.maximum(0, lengths - config.extended_length)
            x_BTD = jnp.where(_valid(x_BTD, lengths), x_BTD, 0)
        index_BT = _backward_index(B, T, lengths)
        x_BTD = self._add_sinusoid(x_BTD, index_BT)
        shared_key, key = (None, None) if keys is None else keys
        x_BTD = dropout(x_BTD, config.dropout, fold(key, INPUT_KEY))
        shared = self._shared(M + T, fold(shared_key, POSITION_KEY))
        _check_form(state, T, lengths, keys)
        y_BTD, state = self._run_layers(
            x_BTD, state, resets_BT, shared, key_start_BT, index_BT, end, key
        )
        if config.final_norm:
            scale_init = initializers(config)["norm_scale"]
            norm = LayerNorm(config.norm_epsilon, scale_init, name="final_norm")
            y_BTD = norm(y_BTD)
        if not config.attend_zero_memory:
            length_B = memory_lib.next_length(state.length_B, resets_BT, end, M=M)
            state = state._replace(length_B=length_B)
        return dropout(y_BTD, config.dropout, fold(key, OUTPUT_KEY)), state

    def _run_layers(
        self, x_BTD, state, resets_BT, shared, key_start_BT, index_BT, end, key
    ):
        """One scan over the stacked parameters: (last output, state but its length)."""
        config = self.config
        layer = Layer(config, self.dtype, parent=None)
        # Asked for parameters that are there, `param` traces all of this for a shape.
        params = self.get_variable("params", "layers")
        if params is None:
            params = self.param("layers", self._init_layers, layer, x_BTD, shared)
        tables_LND = None
        if config.encoding == LEARNED_ABSOLUTE:
            shape = (config.n_layer, config.table_length, x_BTD.shape[-1])
            tables_LND = self.param("position", initializers(config)["kernel"], shape)
        cached = not isinstance(state, Memory)
        if cached:
            state = transformer_xl_cache.after_resets(config, params, state, resets_BT)
        elif not cached:
            hidden_LBMD = state.hidden_LBMD.astype(self.dtype)
            if config.attend_zero_memory:
                hidden_LBMD = _zero_rows(hidden_LBMD, resets_BT)
        carried, memories = state.scanned() if cached else (None, hidden_LBMD)

        def run_layer(carry, scanned):
            x_BTD, carried = carry
            params, memory, table_ND, index = scanned
            if table_ND is not None:
                # Right-aligned; what lies beyond the table uses its first row.
                rows_BT = jnp.maximum(config.table_length - 1 - index_BT, 0)
                x_BTD = x_BTD + table_ND.astype(self.dtype)[rows_BT]
            run = functools.partial(layer.apply, {"params": params}, x_BTD)
            if not cached:
                layer_key = fold(fold(key, LAYERS_KEY), index)
                y_BTD, _ = run(memory, shared, key_start_BT, layer_key)
                return (y_BTD, None), memory_lib.append(memory, x_BTD, end)
            attend = state.attend(
                *(carried, memory, index),
                key_start_BT=key_start_BT,
                end=end,
                window=config.attention_window,
                rotary=config.encoding == ROTARY,
                implementation=config.attention,
            )
            y_BTD, kept = run(x_BTD[:, :0], shared, attend=attend)
            return ((y_BTD, None), kept) if carried is None else ((y_BTD, kept), None)

        run = _remat(config.remat, run_layer)
        carry = x_BTD, carried
        scanned = params, memories, tables_LND, jnp.arange(config.n_layer)
        if config.scan_layers:
            (y_BTD, carried), memories = lax.scan(run, carry, scanned)
        else:
            # Not scan(unroll=...): its body is one function that each layer calls, in
            # which XLA's partitioner (jax 0.10.2, TPU) loses that `data` is split.
            each = []
            for one in _each(scanned, config.n_layer):
                carry, memory = run(carry, one)
                each.append(memory)
            y_BTD, carried = carry
            memories = jax.tree.map(lambda *layers: jnp.stack(layers), *each)
        if cached:
            return y_BTD, state.after(carried, memories)
        return y_BTD, state._replace(hidden_LBMD=memories)

    def _init_layers(self, key, layer, x_BTD, shared):
        """One layer's initialisation, mapped over the layers' keys."""
        r_SD, biases = shared
        one_BTD = x_BTD[:1, :1]
        shared = (None if r_SD is None else r_SD[:1], biases)

        def init_one(key):
            return layer.init(key, one_BTD, one_BTD[:, :0], shared)["params"]

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

    def _shared(self, S, key):
        """What all layers use: the sinusoid of the distances, and u and v if tied."""
        config = self.config
        if config.encoding != RELATIVE:
            return None, None
        clamped = positions.distances(S, config.clamp_length)
        r_SD = positions.sinusoid(clamped, config.d_model, self.dtype)
        r_SD = dropout(r_SD, config.dropout, key)
        if config.untie_r:
            return r_SD, None
        shape, kernel = (
            (config.n_head, config.head_width),
            initializers(config)["kernel"],
        )
        return r_SD, tuple(self.param(name, kernel, shape) for name in "uv")


class TransformerXLModule(nn.Module):
    """Embedding, trunk and softmax."""

    config: TransformerXLConfig
    dtype: Any

    def setup(self):
        config, init = self.config, initializers(self.config)
        bins = Bins(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_embed=config.embedding_width,
            cutoffs=config.cutoffs,
            div_val=config.div_val,
            proj_same_dim=config.proj_same_dim,
        )
        self.embedding = AdaptiveEmbedding(
            bins, init["kernel"], init["projection"], self.dtype
        )
        self.trunk = TrunkModule(config, self.dtype)
        self.softmax = AdaptiveSoftmax(
            bins,
            config.tie_weights,
            config.tie_projections,
            init["kernel"],
            init["projection"],
            init["cluster"],
            self.dtype,
        )

    def __call__(
        self, ids_BT, targets_BT, state, *, resets_BT=None, lengths=None, keys=None
    ):
        y_BTD, state = self._forward(ids_BT, state, resets_BT, lengths, keys)
        B, T = targets_BT.shape
        h_ND = y_BTD[:, -T:].reshape(B * T, -1)
        nll_BT = self.softmax(h_ND, targets_BT.reshape(-1), self.embedding).reshape(
            B, T
        )
        if lengths is not None:
            index_BT = jnp.arange(ids_BT.shape[1] - T, ids_BT.shape[1])[None]
            valid_BT = index_BT < jnp.broadcast_to(lengths, (B,))[:, None]
            nll_BT = jnp.where(valid_BT, nll_BT, 0)
        return nll_BT, state

    def log_probs(self, ids_BT, state, *, resets_BT=None, lengths=None):
        y_BTD, state = self._forward(ids_BT, state, resets_BT, lengths, None)
        B, T, D = y_BTD.shape
        log_p_NV = self.softmax.log_probs(y_BTD.reshape(B * T, D), self.embedding)
        return log_p_NV.reshape(B, T, -1), state

    def run_trunk(self, x_BTD, state, *, resets_BT=None, lengths=None, keys=None):
        return self.trunk(x_BTD, state, resets_BT=resets_BT, lengths=lengths, keys=keys)

    def _forward(self, ids_BT, state, resets_BT, lengths, keys):
        x_BTD = self.embedding(ids_BT) * self.config.d_model**0.5
        x_BTD = constrain(x_BTD, "batch", None, None)
        return self.run_trunk(
            x_BTD, state, resets_BT=resets_BT, lengths=lengths, keys=keys
        )


class TransformerXL(Model):
    """Transformer-XL behind the contract of `Model`."""

    @property
    def memory_length(self) -> int:
        return self.config.memory_length

    @property
    def extended_length(self) -> int:
        return self.config.extended_length

    @property
    def segments_equal_one_pass(self) -> bool:
        """False for types 2 and 3, and for attended zeros that stay in sight."""
        config = self.config
        if self.positions_from_end:
            return False
        # One pass keeps its M zeros to the end; segments push them out of the memory.
        window = config.attention_window
        in_sight = window is None or window > config.memory_length
        return not (config.attend_zero_memory and in_sight)

    @property
    def positions_from_end(self) -> bool:
        return self.config.encoding in (SINUSOID, LEARNED_ABSOLUTE)

    def replay(self, segment_length: int) -> int:
        """Each layer's memory was made with the memories below it.

        Only the first of them lies behind the extended context of the row's start.
        """
        M, E = self.memory_length, self.extended_length
        above = (self.config.n_layer - 1) * -(-M // segment_length)
        return above + -(-(M + E) // segment_length)

    @property
    def resets_in_segment(self) -> bool:
        """False with attend_zero_memory: a reset makes M zeros, which need M slots."""
        return not self.config.attend_zero_memory

    @property
    def _has_dropout(self) -> bool:
        return bool(self.config.dropout or self.config.attention_dropout)

    def init_state(self, batch_size: int, dtype=None) -> Memory:
        """Empty memory; with attend_zero_memory, zeros that count as valid."""
        config = self.config
        dtype = dtype or compute_dtype(config.dtype)
        shape = (config.n_layer, batch_size, config.memory_length, config.d_model)
        valid = config.memory_length if config.attend_zero_memory else 0
        return Memory(jnp.zeros(shape, dtype), jnp.full(batch_size, valid, jnp.int32))

    def state_axes(self) -> Memory:
        return memory_lib.AXES

    def to_cache(self, params, state: Memory, *, segment_length: int = 1):
        """Keys and values; for single tokens in a ring (layers.cache)."""
        dtype = compute_dtype(self.config.dtype, params)
        layers = params.get("trunk", params)["layers"]
        return jax.lax.stop_gradient(
            transformer_xl_cache.to_cache(
                self.config, layers, state, segment_length, dtype
            )
        )

    def cache_axes(self, *, segment_length: int = 1):
        return transformer_xl_cache.axes(self.config, segment_length)

    def param_axes(self, params):
        return param_axes(
            params, attention.AXES | feed_forward.AXES | adaptive.AXES | _AXES
        )

    def _module(self, dtype) -> TransformerXLModule:
        return TransformerXLModule(self.config, dtype)


# The learned absolute positions of type 3, [L, N, D]; u and v shared by all layers.
_AXES = {
    "trunk/position": (None, None, "embed"),
    "trunk/u": ("heads", None),
    "trunk/v": ("heads", None),
}


def _check_form(state, T: int, lengths, keys):
    """Raises where a cached state cannot do what the plain one can."""
    if isinstance(state, Memory):
        return
    if keys is not None:
        raise ValueError("train=True needs the state of init_state, not of to_cache")
    if state.longest is not None and T > state.longest:
        raise ValueError(
            f"a segment of {T} inputs, but the state was made by to_cache(..., "
            f"segment_length={state.longest})"
        )
    if isinstance(state, Ring) and lengths is not None:
        raise ValueError(
            "lengths_B with a state of to_cache(..., segment_length=1): its rows "
            "advance together"
        )


def _remat(name, run_layer):
    """run_layer that keeps of its inside what `config.remat` says."""
    if name == "none":
        return run_layer
    policy = jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME)
    return jax.checkpoint(run_layer, policy=policy if name == "attention" else None)


def _each(stacked, n_layer: int) -> list:
    """One tree a layer, of a tree of stacked arrays.

    The gradient of a split is one concatenation; that of an index for each layer is a
    sum of as many arrays of the whole size.
    """
    leaves, structure = jax.tree.flatten(stacked)
    split = [lax.split(leaf, [1] * n_layer) for leaf in leaves]
    return [structure.unflatten([x[i][0] for x in split]) for i in range(n_layer)]


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
