"""The layers of the Performer, and what they carry from segment to segment."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xlformer.errors import UserError
from xlformer.kernels.dropout import dropout, fold
from xlformer.layers import favor, positions, stack
from xlformer.layers import memory as memory_lib
from xlformer.layers.feed_forward import LayerNorm
from xlformer.models.base import Aux
from xlformer.models.performer.config import FAVOR, IDENTITY, LSH, PerformerConfig
from xlformer.models.performer.layer import Layer, Own, Segment
from xlformer.sharding import constrain

# Which number is folded into the dropout key for what.
INPUT_KEY, LAYERS_KEY = range(2)
# The most that is counted: positions are int32, and a segment is still added to it.
FARTHEST = 1 << 30
PARAM_AXES = {"trunk/position": (None, "embed")}


class State(NamedTuple):
    """What FAVOR carries.

    Attributes:
      sums: linear_attention.Sums of each layer, [L, B, ...], in at least float32.
      position_B: int32, how many tokens came since the row's last reset.
      draw_B: int32, the number of the draw whose features the sums are made of.
    """

    sums: Any
    position_B: Any
    draw_B: Any


class Cached(NamedTuple):
    """A State for reading: what was drawn last is at hand for the next call.

    Attributes:
      state: the State.
      w_LMK: the projections of all layers, of all rows.
      draw: the number of their draw, int32; -1 before there is one.
    """

    state: Any
    w_LMK: Any
    draw: Any


class Hashes(NamedTuple):
    """What lsh carries: the words of a key a row, uint32, which stay as they are."""

    words_BW: Any


class TrunkModule(nn.Module):
    """The trunk of models.tokens: parameters are stacked [L, ...]."""

    config: PerformerConfig
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
        del train  # `keys` says what is dropped.
        config, (B, T, _) = self.config, x_BTD.shape
        if config.bounded and T > config.context_length:
            raise UserError(
                f"a segment of {T} tokens, but config.model.context_length="
                f"{config.context_length}: it ends there"
            )
        end, valid_BT = T if lengths is None else lengths, None
        if lengths is not None:
            valid_BT = jnp.arange(T)[None] < jnp.broadcast_to(lengths, (B,))[:, None]
            x_BTD = jnp.where(valid_BT[..., None], x_BTD, 0)
        if not config.resets_inside:
            resets_BT = None  # They lie before the segment, of which there is nothing.
        elif resets_BT is not None and valid_BT is not None:
            resets_BT = resets_BT & valid_BT  # One in the padding is of what follows.
        draw = favor.draw_number(step, config.interval)
        cached = state if isinstance(state, Cached) else None
        state = cached.state if cached else state
        w_LMK = self._projections(draw, cached)
        before_B, start_BT = _before(config, state, resets_BT, draw, (B, T))
        segment = Segment(
            start_BT,
            valid_BT,
            self._table(before_B, start_BT, T),
            _hashes(state, step) if config.mechanism == LSH else None,
        )
        if config.positions == "learned":
            x_BTD = x_BTD + self._learned(start_BT, T)
        key = None if keys is None else keys.rows_B
        x_BTD = dropout(x_BTD, config.dropout, fold(key, INPUT_KEY))
        own = Own(
            jnp.arange(config.n_layer), w_LMK, state.sums if config.carries else None
        )
        y_BTD, sums = self._layers(x_BTD, segment, own, fold(key, LAYERS_KEY))
        y_BTD = LayerNorm(config.norm_epsilon, name="final_norm")(y_BTD)
        if config.carries:
            counts = memory_lib.next_length(before_B, resets_BT, end, M=FARTHEST)
            # A row without a token keeps its sums, and so what these are made of.
            some_B = jnp.broadcast_to(jnp.asarray(end) > 0, (B,))
            position_B = jnp.where(some_B, counts, state.position_B)
            draw_B = jnp.where(some_B, draw, state.draw_B)
            state = State(sums, position_B, draw_B)
        if cached:
            state = Cached(state, w_LMK, draw)
        return y_BTD, state, Aux(0.0, {})

    def _layers(self, x_BTD, segment: Segment, own: Own, key):
        """All layers: (the output of the last one, their new sums or None)."""
        config = self.config
        # Not a submodule (parent=None): the parameters of all layers are stacked.
        layer = Layer(config, self.dtype, parent=None)

        def run_layer(x_BTD, part):
            params, own = part
            arguments = x_BTD, segment, own, fold(key, own.index)
            return layer.apply({"params": params}, *arguments)

        # Even where the parameters exist, `param` would trace the initialisation.
        params = self.get_variable("params", "layers")
        if params is None:
            params = self.param("layers", self._initial(layer, x_BTD, segment, own))
        return stack.run(
            run_layer,
            x_BTD,
            (params, own),
            scan=config.scan_layers,
            remat=config.remat,
        )

    def _initial(self, layer, *arguments):
        """key -> parameters of all layers; they depend on no size of the arguments."""
        x_BTD, segment, own = arguments
        first = jax.tree.map(lambda x: x[0], own)

        def init(key):
            def init_one(key):
                return layer.init(key, x_BTD, segment, first)["params"]

            return jax.vmap(init_one)(jax.random.split(key, self.config.n_layer))

        return init

    def _projections(self, draw, cached: Cached | None):
        """The projections of all layers, drawn at once: [L, M, K], or None."""
        config = self.config
        if config.mechanism != FAVOR or not config.projected:
            return None

        def one(layer):
            return favor.projection(
                config.feature_seed,
                layer,
                draw,
                features_name=config.features,
                m=config.projection_rows,
                K=config.head_width,
                orthogonal=config.orthogonal,
                dtype=jnp.promote_types(self.dtype, jnp.float32),
            )

        def drawn():
            # On every device all of them: they are small, and a split QR is slow.
            w_LMK = jax.vmap(one)(jnp.arange(config.n_layer))
            return constrain(w_LMK, None, None, None)

        with jax.named_scope("projections"):
            if cached is None:
                return drawn()
            # For one token a QR of each layer would cost as much as all the rest.
            return lax.cond(cached.draw == draw, lambda: cached.w_LMK, drawn)

    # Positions ------------------------------------------------------------------------

    def _table(self, before_B, start_BT, T: int):
        """The sinusoids by which queries and keys are turned, [1 or B, T, K], or None.

        Features of a turned vector know more than distances: so positions count from
        the row's last reset, and on from segment to segment.
        """
        config, exact = self.config, jnp.promote_types(self.dtype, jnp.float32)
        if config.positions != "rotary" or config.mechanism == IDENTITY:
            return None
        index_T = np.arange(T)[None]
        if config.mechanism == FAVOR and start_BT is not None:
            index_T = jnp.where(
                start_BT < 0, before_B[:, None] + index_T, index_T - start_BT
            )
        return positions.sinusoid(index_T, config.head_width, exact)

    def _learned(self, start_BT, T: int):
        """Rows of the table, counted from the segment's start or the last reset."""
        config = self.config
        normal = nn.initializers.normal(config.init_std)
        shape = config.context_length, config.d_model
        # Whole on every device: rows of a batch that is split look it up.
        table_ND = self.param("position", normal, shape).astype(self.dtype)
        table_ND = constrain(table_ND, None, None)
        if start_BT is None:
            return table_ND[None, :T]
        return table_ND[jnp.arange(T)[None] - start_BT]


def _before(config: PerformerConfig, state, resets_BT, draw, shape):
    """(positions before the segment [B], Segment.start_BT); None where nothing is."""
    B, T = shape
    if config.carries:
        # Sums of another draw are of other features: the row begins anew.
        there_B = state.draw_B == draw
        before_B = jnp.where(there_B, state.position_B, 0)
        # As a memory of one slot, which counts or does not.
        slots_B = there_B.astype(jnp.int32)
        return before_B, memory_lib.key_start(slots_B, resets_BT, M=1, T=T) - 1
    if resets_BT is None:
        return None, None
    zero_B = jnp.zeros(B, jnp.int32)
    return zero_B, memory_lib.key_start(zero_B, resets_BT, M=0, T=T)


def _hashes(state: Hashes, step):
    """A key a row for this step; in evaluation that of the checkpoint, and one."""
    key_B = jax.random.wrap_key_data(state.words_BW)
    return fold(key_B, 0 if step is None else step)
