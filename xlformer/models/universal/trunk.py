"""The steps of the Universal Transformer over their shared layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xlformer.kernels.dropout import dropout, fold
from xlformer.kernels.visibility import Visibility
from xlformer.layers import halting as halting_lib
from xlformer.layers import memory as memory_lib
from xlformer.layers import positions, stack
from xlformer.layers.feed_forward import LayerNorm
from xlformer.layers.separable import REACH
from xlformer.models.base import Aux
from xlformer.models.universal.config import UniversalConfig
from xlformer.models.universal.layer import Layer
from xlformer.models.universal.signals import Signals

# Which number is folded into the dropout key for what.
INPUT_KEY, LAYERS_KEY = range(2)
# The most that is counted: positions are int32, and a segment is still added to it.
FARTHEST = 1 << 30


class State(NamedTuple):
    """What is carried: of each layer of each step, L = steps * n_layer in order.

    Attributes:
      hidden_LBMD: its inputs, with the signals of its step, at the last M positions.
      contexts: the inputs of its convolutions at the last few, [L, B, C, D] and
        [L, B, C, F]; () without them.
      position_B: int32, how many tokens came since the row's last reset; no more of
        them than count. 0 where nothing is carried.
    """

    hidden_LBMD: Any
    contexts: Any
    position_B: Any


class Segment(NamedTuple):
    """What every layer has to know of a segment.

    Attributes:
      start_BT: the first position that each one may see, as far as reset and beginning
        are concerned: 0 is the segment's first, -1 the one before it. Or None.
      visibility: the same, and more, for attention.
      r_SD: sinusoid of each distance, where positions are relative.
      end: how many of its positions enter the memory: a number, or one a row.
      key: of the layers' dropout; None switches it off.
    """

    start_BT: Any
    visibility: Visibility
    r_SD: Any
    end: Any
    key: Any


def farthest(config: UniversalConfig) -> int:
    """The largest position_B that is told from larger ones."""
    if not config.memory_length:
        return 0
    if config.absolute:
        return FARTHEST
    return max(config.memory_length, REACH if config.context_widths else 0)


class TrunkModule(nn.Module):
    """The trunk of models.tokens: parameters of a step's layers are stacked."""

    config: UniversalConfig
    dtype: Any

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
        del step, train  # No schedule inside this model; `keys` says what is dropped.
        y_BTD, state, halting = self.forward(x_BTD, state, resets_BT, lengths, keys)
        if halting is None:
            return y_BTD, state, Aux(0.0, {})
        means = [
            _mean(x_BT, lengths) for x_BT in (halting.updates_BT, halting.remainder_BT)
        ]
        loss = self.config.act_loss_weight * (means[0] + means[1])
        metrics = {"ponder/updates": means[0], "ponder/remainder": means[1]}
        return y_BTD, state, Aux(loss, metrics)

    @nn.compact
    def forward(self, x_BTD, state, resets_BT=None, lengths=None, keys=None):
        """(y_BTD, the new state, layers.halting.Halting or None without ACT)."""
        config, T = self.config, x_BTD.shape[1]
        end, turn_B = T if lengths is None else lengths, None
        if lengths is not None:
            x_BTD = jnp.where(_valid(x_BTD.shape, lengths)[..., None], x_BTD, 0)
        if not config.causal:
            # They lie before the segment, of which there is nothing.
            resets_BT = None
            if lengths is not None:
                # Only what comes before a position can be hidden, by where it begins to
                # see. So the padding is turned round to the front.
                turn_B = T - jnp.broadcast_to(lengths, x_BTD.shape[:1])
                x_BTD = memory_lib.turned(x_BTD, turn_B)
        start_BT = self._start(state, resets_BT, turn_B, T)
        key = None if keys is None else keys.rows_B
        segment = Segment(
            start_BT,
            self._visibility(start_BT),
            self._distances(T),
            end,
            fold(key, LAYERS_KEY),
        )
        x_BTD = dropout(x_BTD, config.dropout, fold(key, INPUT_KEY))
        y_BTD, halting, kept = self._steps(x_BTD, state, segment)
        if config.pre_norm:
            y_BTD = LayerNorm(config.norm_epsilon, name="final_norm")(y_BTD)
        if turn_B is not None:
            y_BTD, halting = jax.tree.map(
                lambda x: memory_lib.turned(x, -turn_B), (y_BTD, halting)
            )
        position_B = memory_lib.next_length(
            state.position_B, resets_BT, end, M=farthest(config)
        )
        return y_BTD, State(*kept, position_B), halting

    def _steps(self, x_BTD, state: State, segment: Segment):
        """All steps: (the output before its norm, Halting, what the state keeps)."""
        config, n_layer = self.config, self.config.n_layer
        run_layers = self._layers(self._parameters(x_BTD, segment), segment)
        signals = Signals(config, self.dtype, name="signals")
        position_BTD, step_N11D = signals(x_BTD.shape[1], segment.start_BT)
        # Not a submodule: its parameters are used inside of a loop of JAX's.
        probability = self._probability()

        def run_step(carry, part):
            x_BTD, y_BTD, halting = carry
            n, signal_11D, carried = part
            with jax.named_scope("signals"):
                input_BTD = x_BTD + (0 if position_BTD is None else position_BTD)
                input_BTD = input_BTD + (0 if signal_11D is None else signal_11D)
            if halting is None:
                x_BTD, kept = run_layers(input_BTD, n, carried)
                return (x_BTD, None, None), kept
            if config.copy_halted:
                # As others see it, too: nothing is added to it any more.
                halted_BT1 = halting.halted_BT[..., None]
                input_BTD = jnp.where(halted_BT1, x_BTD, input_BTD)
            output_BTD, kept = run_layers(input_BTD, n, carried)
            if config.copy_halted:
                output_BTD = jnp.where(halted_BT1, x_BTD, output_BTD)
            with jax.named_scope("halting"):
                # Of the state before the layers; its weight is that of the one after.
                p_BT = probability(input_BTD)
                if config.act == halting_lib.GLOBAL:
                    p_BT = halting_lib.global_probability(p_BT, segment.start_BT)
                last = (n == config.steps - 1) & config.force_halt_last
                weights_BT, halting = halting_lib.halt(
                    halting, p_BT, epsilon=config.act_epsilon, last=last
                )
                y_BTD = halting_lib.combine(y_BTD, output_BTD, weights_BT, config.act)
            return (output_BTD, y_BTD, halting), kept

        carry: tuple[Any, Any, Any] = x_BTD, None, None
        if config.act != "none":
            exact = jnp.promote_types(self.dtype, jnp.float32)
            halting = halting_lib.begin(x_BTD.shape[:2], exact)
            carry = x_BTD, jnp.zeros_like(x_BTD), halting
        carried = (state.hidden_LBMD.astype(self.dtype), state.contexts)
        by_step = jax.tree.map(
            lambda x: x.reshape(config.steps, n_layer, *x.shape[1:]), carried
        )
        stacked = jnp.arange(config.steps), step_N11D, by_step
        (x_BTD, y_BTD, halting), kept = stack.run(
            run_step, carry, stacked, scan=config.scan_layers
        )
        kept = jax.tree.map(lambda x: x.reshape(config.depth, *x.shape[2:]), kept)
        return (x_BTD if y_BTD is None else y_BTD), halting, kept

    def _layers(self, layers, segment: Segment):
        """(x_BTD, step, its memories) -> (the output of its layers, new memories)."""
        config, layer = self.config, Layer(self.config, self.dtype, parent=None)

        def run_layer(carry, part):
            x_BTD, n = carry
            params, i, (memory_BMD, contexts) = part
            # Folded by the number of the layer among those of all steps: looped and
            # unrolled steps drop the same units.
            key = fold(segment.key, n * config.n_layer + i)
            y_BTD, inputs = layer.apply(
                {"params": params}, x_BTD, memory_BMD, contexts, segment, key
            )
            memory_BMD = memory_lib.append(memory_BMD, x_BTD, segment.end)
            contexts = tuple(
                memory_lib.append(*both, segment.end)
                for both in zip(contexts, inputs, strict=False)
            )
            return (y_BTD, n), (memory_BMD, contexts)

        def run(x_BTD, n, carried):
            stacked = layers, jnp.arange(config.n_layer), carried
            # Of the distinct layers there are few; it is the steps that are looped.
            (y_BTD, _), kept = stack.run(
                run_layer, (x_BTD, n), stacked, scan=False, remat=config.remat
            )
            return y_BTD, kept

        return run

    # Parameters -----------------------------------------------------------------------

    def _parameters(self, x_BTD, segment: Segment):
        """Those of a step's layers, stacked."""
        # Even where the parameters exist, `param` would trace the initialisation.
        params = self.get_variable("params", "layers")
        if params is not None:
            return params
        layer = Layer(self.config, self.dtype, parent=None)
        # One token without memory: shapes of parameters depend on neither.
        one_BTD, r_SD = x_BTD[:1, :1], segment.r_SD
        one = segment._replace(
            start_BT=None,
            visibility=self.config.visibility(),
            r_SD=None if r_SD is None else r_SD[:1],
        )

        def init(key):
            def init_one(key):
                arguments = one_BTD, one_BTD[:, :0], (), one
                return layer.init(key, *arguments)["params"]

            return jax.vmap(init_one)(jax.random.split(key, self.config.n_layer))

        return self.param("layers", init)

    def _probability(self):
        """(state_BTD) -> p_BT, in at least float32; None without ACT."""
        if self.config.act == "none":
            return None
        exact = jnp.promote_types(self.dtype, jnp.float32)
        init = nn.initializers.normal(self.config.std)
        kernel_D = self.param("halting_kernel", init, (self.config.d_model,))
        kernel_D = kernel_D.astype(exact)
        # It begins as 1, as in both: the first steps are then the likely ones.
        bias = self.param("halting_bias", nn.initializers.ones, ()).astype(exact)
        return lambda x_BTD: nn.sigmoid(jnp.einsum("BTD,D->BT", x_BTD, kernel_D) + bias)

    # What is seen --------------------------------------------------------------------

    def _start(self, state: State, resets_BT, turn_B, T: int):
        """Segment.start_BT; None where nothing can be hidden."""
        far = farthest(self.config)
        if not far and resets_BT is None and turn_B is None:
            return None
        start_BT = memory_lib.key_start(state.position_B, resets_BT, M=far, T=T) - far
        if turn_B is not None:
            # No position begins to see after itself; what padding sees does not matter.
            ahead_BT = jnp.minimum(turn_B[:, None], jnp.arange(T)[None])
            start_BT = jnp.maximum(start_BT, ahead_BT)
        return start_BT

    def _visibility(self, start_BT) -> Visibility:
        if start_BT is None:
            return self.config.visibility()
        M = self.config.memory_length
        return self.config.visibility(jnp.maximum(start_BT + M, 0))

    def _distances(self, T: int):
        config = self.config
        if config.positions != "relative":
            return None
        first = 0 if config.causal else 1 - T
        distances_S = np.arange(first, config.memory_length + T)
        return positions.sinusoid(distances_S, config.d_model, self.dtype)


def _valid(shape, lengths):
    lengths_B = jnp.broadcast_to(lengths, shape[:1])
    return jnp.arange(shape[1])[None] < lengths_B[:, None]


def _mean(x_BT, lengths):
    """Of the valid positions of each row, and of these the mean."""
    if lengths is None:
        return x_BT.mean()
    valid_BT = _valid(x_BT.shape, lengths)
    sum_B = jnp.where(valid_BT, x_BT, 0).sum(1)
    return (sum_B / jnp.maximum(valid_BT.sum(1), 1)).mean()
