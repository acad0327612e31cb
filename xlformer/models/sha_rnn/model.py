"""SHA-RNN (Merity 2019, arXiv:1911.11423): LSTMs, one head of attention, the Boom.

A block is norm, LSTM, attention over what is remembered (in one block, in all or in
none), norm, Boom. As in the original program: no residual around the LSTM; residuals
are of normalised vectors; no positions; six norms a block, some of which nobody reads,
and two unused gates beside each attention: they are part of its counts (53.80M).

Otherwise: the memory is a ring of memory_length slots, its num_max_positions, the same
numbers with nothing copied; only a segment as long as all of it sees no memory, where
the program, by a slip (m[-0:]), keeps everything. A longer one is refused. Norms are
computed in float32 throughout, there in float16 where its autocast lets them. There is
no split softmax, which the program has from 75,000 words on, no LSTM wider than the
model, and its Lookahead, which it never runs, is not here.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlformer.errors import UserError
from xlformer.layers import adaptive, recurrent, single_head
from xlformer.layers.adaptive import Bins
from xlformer.layers.feed_forward import MATRICES, PARAM_AXES
from xlformer.layers.recurrent import LSTMState
from xlformer.layers.single_head import Ring
from xlformer.models import parameters, sides
from xlformer.models.sha_rnn import config as config_lib
from xlformer.models.sha_rnn.config import SHARNNConfig
from xlformer.models.sha_rnn.trunk import State, TrunkModule
from xlformer.models.tokens import TokenModel, Tokens

PARTS = 64  # tokens of a prompt that are read at once, at most
ATTENTION_AXES = {
    "attention/query_kernel": ("embed", "mlp"),
    "attention/value_kernel": ("embed", None, "mlp"),
    "attention/value_bias": (None, "mlp"),
}
# The two sides of the matrices among them: see models.sides.
ATTENTION_MATRICES = {
    "attention/query_kernel": ((0,), (1,)),
    "attention/value_kernel": ((0,), (2,)),
}


class SHARNN(TokenModel):
    """A SHA-RNN behind the contract of `Model`.

    Its segments equal one pass as long as no more than memory_length tokens came.
    """

    Config = SHARNNConfig

    def trunk_module(self, dtype) -> TrunkModule:
        return TrunkModule(self.config, dtype)

    def tokens(self) -> Tokens:
        config = self.config
        return Tokens(
            Bins(config.vocab_size, config.d_model, config.d_model),
            table_init=nn.initializers.normal(config.std),
        )

    def layer_name(self, at: tuple[int, ...]) -> str:
        return f"block {at[0] + 1}"

    @property
    def positions_from_end(self) -> bool:
        """Without a window: each token of a segment hides the oldest that it remembers.

        Padding, too, if its number is not told.
        """
        return bool(self.config.attending) and self.config.window is None

    @property
    def needs_rngs(self) -> bool:
        config = self.config
        return bool(config.dropout or config.hidden_dropout or config.input_dropout)

    @property
    def longest_segment(self) -> int | None:
        return self.config.longest_segment

    def for_generation(self) -> SHARNN:
        """A token sees as many as one at a time would, however many are read at once.

        The memory has room for a part of a prompt beside them.
        """
        config = self.config
        if not config.attending:
            return self
        window = config.memory_length - 1 if config.window is None else config.window
        return self.for_reading(memory_length=window + PARTS, window=window)

    def init_state(self, batch_size: int, dtype=None) -> State:
        config, dtype = self.config, jnp.dtype(dtype or self.dtype())
        cells = jnp.promote_types(dtype, jnp.float32)
        D, N, P = config.d_model, config.n_layer, config.memory_length
        lstm = LSTMState(
            tuple(jnp.zeros((batch_size, D), dtype) for _ in range(N)),
            tuple(jnp.zeros((batch_size, D), cells) for _ in range(N)),
        )
        blocks = len(config.attending)
        if not blocks:
            return State(lstm, ())
        ring = single_head.empty(batch_size, P, D, blocks=blocks, dtype=dtype)
        return State(lstm, ring)

    def state_axes(self) -> State:
        config = self.config
        # A cell lies where its gates are made.
        lstm = (("batch", "mlp"),) * config.n_layer
        rows = (("batch", "memory", None),) * len(config.attending)
        ring = Ring(rows, ("batch",), ("batch",)) if rows else ()
        return State(LSTMState(lstm, lstm), ring)

    def param_axes(self, params):
        axes = adaptive.PARAM_AXES | recurrent.PARAM_AXES | PARAM_AXES | ATTENTION_AXES
        return parameters.param_axes(params, axes)

    def matrices(self, params):
        found = recurrent.MATRICES | MATRICES | ATTENTION_MATRICES
        return sides.by_name(params, found)

    def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
        size, tensor = self.config.d_model, mesh.shape["tensor"]
        if size % tensor:
            raise UserError(
                f"config.model.d_model={size} is not divisible by config.mesh.tensor="
                f"{tensor}: it splits the units of a layer"
            )

    def flops(self, **options) -> config_lib.Flops:
        return config_lib.flops(self.config, **options)

    def kept_for_backward(self) -> float:
        return config_lib.kept_for_backward(self.config)

    def summed_activations(self) -> float:
        return config_lib.summed_activations(self.config)

    def card(self) -> dict:
        config = self.config
        found = {"memory_length": config.memory_length, "attention": config.attention}
        return {**super().card(), **found}


def collapse(config: SHARNNConfig, params) -> tuple[SHARNNConfig, dict]:
    """The same model with one vector in place of what makes the values' (vq_collapse).

    For inference: each block that attends has 2 D (D + 1) numbers fewer, and the same
    outputs; it is no longer what was trained.
    """
    collapsed = dataclasses.replace(config, collapsed=True)
    if config.collapsed:
        return config, params
    trunk = dict(params["trunk"])
    for k in config.attending:
        attention = dict(trunk[f"block_{k}"]["attention"])
        names = "value_gate", "value_kernel", "value_bias"
        made_of = [jnp.asarray(attention.pop(name)) for name in names]
        attention["value_gate"] = single_head.overparameterised(*made_of)
        trunk[f"block_{k}"] = {**trunk[f"block_{k}"], "attention": attention}
    return collapsed, {**params, "trunk": trunk}
