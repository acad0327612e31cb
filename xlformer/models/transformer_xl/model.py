"""Transformer-XL (Dai et al. 2019, arXiv:1901.02860).

Layer inputs of the last memory_length positions are cached, without gradient, and
attended together with the segment; positions enter as distances. Post-norm, all of
the original's options, and the counter-examples that its paper compares with.

With gate='gru' it is GTrXL (Parisotto et al. 2019, arXiv:1910.06764), the form that
reinforcement learning uses: norms on the inputs of the sub-layers (the memory is
normalised when it is read), a ReLU on their outputs, and gates for the residual sums.
The paper leaves the biases of attention open. Here its output has one, which the ReLU
follows; those of queries are u and v (with untie_r), those of values would only add to
it, and those of keys and positions cancel. DI-engine's program makes its queries of
what is not normalised: norm_queries=False.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xlformer.layers import adaptive, attention, feed_forward, gating
from xlformer.layers import memory as memory_lib
from xlformer.layers.attention import LEARNED_ABSOLUTE, SINUSOID
from xlformer.layers.memory import Memory
from xlformer.models import checks, parameters, sides
from xlformer.models.tokens import TokenModel, Tokens
from xlformer.models.transformer_xl import cache as cache_lib
from xlformer.models.transformer_xl import flops as flops_lib
from xlformer.models.transformer_xl import footprint
from xlformer.models.transformer_xl.config import TransformerXLConfig
from xlformer.models.transformer_xl.layer import initializers
from xlformer.models.transformer_xl.trunk import TrunkModule


class TransformerXL(TokenModel):
    """Transformer-XL behind the contract of `Model`."""

    Config = TransformerXLConfig

    def trunk_module(self, dtype) -> TrunkModule:
        return TrunkModule(self.config, dtype)

    def tokens(self) -> Tokens:
        config, init = self.config, initializers(self.config)
        return Tokens(
            config.bins,
            # After the projection to d_model, as in the originals.
            scale=config.d_model**0.5,
            tie_weights=config.tie_weights,
            tie_projections=config.tie_projections,
            table_init=init["kernel"],
            projection_init=init["projection"],
            cluster_init=init["cluster"],
        )

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
        in_sight = config.visibility().allows(1, 0, config.memory_length)
        return not (config.attend_zero_memory and in_sight)

    @property
    def segments_of_any_length(self) -> bool:
        """Where a window, as same_length makes one, is no longer than the memory."""
        config = self.config
        window = config.attention_window
        covered = window is not None and window <= config.memory_length
        # Context that is read again begins with each segment.
        return covered and self.segments_equal_one_pass and not config.extended_length

    @property
    def positions_from_end(self) -> bool:
        return self.config.encoding in (SINUSOID, LEARNED_ABSOLUTE)

    def replay(self, segment_length: int) -> int:
        """Segments that bring an empty state to what it is in the middle of a text.

        Each layer's memory was made with the memory of the layer below, so n_layer of
        them follow each other. In a model of three layers, filling the memory once was
        0.3 nats off. Only the first lies behind the extended context of a row's start.
        """
        M, E = self.memory_length, self.extended_length
        above = (self.config.n_layer - 1) * -(-M // segment_length)
        return above + -(-(M + E) // segment_length)

    @property
    def resets_in_segment(self) -> bool:
        """False with attend_zero_memory: a reset makes M zeros, which need M slots."""
        return not self.config.attend_zero_memory

    @property
    def needs_rngs(self) -> bool:
        return bool(self.config.dropout or self.config.attention_dropout)

    def init_state(self, batch_size: int, dtype=None) -> Memory:
        """Empty memory; with attend_zero_memory, zeros that count as valid."""
        config = self.config
        dtype = dtype or self.dtype()
        shape = (config.n_layer, batch_size, config.memory_length, config.d_model)
        valid = config.memory_length if config.attend_zero_memory else 0
        return Memory(jnp.zeros(shape, dtype), jnp.full(batch_size, valid, jnp.int32))

    def state_axes(self) -> Memory:
        return memory_lib.STATE_AXES

    def to_cache(self, params, state: Memory, *, segment_length: int = 1):
        """Keys and values; for single tokens in a ring (layers.cache)."""
        layers = params.get("trunk", params)["layers"]
        cache = cache_lib.to_cache(
            self.config, layers, state, segment_length, self.dtype(params)
        )
        # It is made of parameters and would pass gradients on; the memory does not.
        return jax.lax.stop_gradient(cache)

    def cache_axes(self, *, segment_length: int = 1):
        return cache_lib.axes(self.config, segment_length)

    def param_axes(self, params):
        layers = attention.PARAM_AXES | feed_forward.PARAM_AXES | gating.PARAM_AXES
        tables = layers | adaptive.PARAM_AXES | TRUNK_AXES
        return parameters.param_axes(params, tables)

    def matrices(self, params):
        layers = attention.MATRICES | feed_forward.MATRICES | gating.MATRICES
        return sides.by_name(params, layers)

    def for_generation(self) -> TransformerXL:
        """Extended context has no place here: the memory takes in every token.

        Every token sees memory_length positions and itself: without a window the first
        tokens of a call would see fewer than its last ones.
        """
        super().for_generation()
        M, window = self.memory_length, self.config.attention_window
        # With a wider one the later tokens of a part of the prompt would see more than
        # the memory has room for.
        window = M if window is None else min(window, M)
        return self.for_reading(window=window, extended_length=0)

    def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
        checks.heads(self.config, mesh)

    def flops(self, **options) -> flops_lib.Flops:
        return flops_lib.segment(self.config, **options)

    def kept_for_backward(self) -> float:
        return footprint.kept_for_backward(self.config)

    def summed_activations(self) -> float:
        return footprint.summed_activations(self.config)

    def to_save_memory(self) -> dict:
        return {} if self.config.remat != "none" else {"remat": "full"}

    def card(self) -> dict:
        return {
            **super().card(),
            "clamp_length": self.config.clamp_length,
            "window": self.config.attention_window,
        }


# The learned absolute positions of type 3, [L, N, D]; u and v shared by all layers.
TRUNK_AXES = {
    "trunk/position": (None, None, "embed"),
    "trunk/u": ("heads", None),
    "trunk/v": ("heads", None),
}
