"""Universal Transformer (Dehghani et al. 2018, arXiv:1807.03819).

The same layers are applied n_step times; in each step the position and the number of
the step are added to every token. As a causal language model, decoder only.

It follows tensor2tensor's program where that differs from the paper:

- Norms come before attention and transition, and one more after the last step
  (pre_norm=False is the paper's: after each residual, and none at the end).
- Positions count from 0, the halves of the sinusoid are concatenated and its timescales
  end at 10000 exactly; the paper interleaves sines and cosines and counts from 1.
- The signal of the step is learned (step_signal='sinusoid' is the paper's), its row
  times sqrt(d_model). Both signals are added to the residual, where they pile up.
- n_layer distinct layers of a step share one addition of the signals.
- ACT: p is read off the state with its signals, before the layers; its weight is that
  of the state after them.

Three things that go by one name in the paper and its program:

- act='accumulate' is Graves' ACT: the output is the sum of w s, and weights sum to 1.
  act='convex' is the paper's listing and the program's default, 'basic': y <- w s +
  (1-w) y, whose effective weights sum to 1 - prod(1-w) and favour late steps. Until
  August 2018 a slip in the program made it nearly the first. act='global', one
  probability for all positions, looks ahead: it needs causal=False.
- A halted position goes on being transformed, since others attend to it; only its
  weights stop. copy_halted=True is what the paper's text says: it stays as it is.
- Where the most steps (act_max_steps, by default 2 n_step) bring no halt, the program's
  weights sum to less than 1. force_halt_last, on by default, gives the last the rest.

What neither has: a memory (memory_length > 0) of the inputs of every layer of every
step, T states a token, with which segments equal one pass while nothing is forgotten.
Absolute positions then count on from the row's last reset, and sepconv carries its left
context. positions='relative' are Transformer-XL's, with u and v. With memory_length=0,
which ACT needs, nothing is carried: positions begin at 0 in every segment, and text is
continued with a window that slides (models/windowed.py).

Not here: encoder and decoder, the program's other recurrences (highway, skip, gru, ...)
and its act_type='random'. Hidden units are dropped at the rate of the residuals, where
the program has a relu_dropout of its own.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlformer.layers import adaptive, attention, feed_forward, separable
from xlformer.layers import memory as memory_lib
from xlformer.models import checks, parameters, sides
from xlformer.models.base import Model
from xlformer.models.tokens import TokenModel, Tokens
from xlformer.models.universal import flops as flops_lib
from xlformer.models.universal import signals
from xlformer.models.universal.config import UniversalConfig
from xlformer.models.universal.trunk import State, TrunkModule
from xlformer.models.windowed import Windowed


class UniversalTransformer(TokenModel):
    """The Universal Transformer behind the contract of `Model`."""

    Config = UniversalConfig

    def trunk_module(self, dtype) -> TrunkModule:
        return TrunkModule(self.config, dtype)

    def tokens(self) -> Tokens:
        """One table, tied, times sqrt(d_model)."""
        config = self.config
        normal = nn.initializers.normal(config.std)
        return Tokens(config.bins, scale=config.d_model**0.5, table_init=normal)

    def layer_name(self, at: tuple[int, ...]) -> str:
        step, *layer = at
        layers = self.config.n_layer > 1 and layer
        return f"step {step + 1}" + (f", layer {layer[0] + 1}" if layers else "")

    @property
    def causal(self) -> bool:
        return self.config.causal

    @property
    def memory_length(self) -> int:
        return self.config.memory_length

    @property
    def extended_length(self) -> int:
        return self.config.extended_length

    @property
    def longest_segment(self) -> int | None:
        rows = self.config.table_length
        return rows - self.config.extended_length if rows else None

    @property
    def positions_from_end(self) -> bool:
        return False

    @property
    def resets_in_segment(self) -> bool:
        """False where a token sees later ones, which a reset between would change."""
        return self.causal

    @property
    def needs_rngs(self) -> bool:
        return bool(self.config.dropout or self.config.attention_dropout)

    def replay(self, segment_length: int) -> int | None:
        """Segments that bring an empty state to what it is in the middle of a text.

        As in Transformer-XL each layer of each step waits for the one below; a
        convolution is right only some tokens after what it reads is. Positions that
        are counted from the beginning of the text are never made up for.
        """
        config, T = self.config, segment_length
        if not config.memory_length:
            return super().replay(T)
        if config.absolute:
            return None
        reach = separable.REACH if config.context_widths else 0
        M = config.memory_length
        above = (config.depth - 1) * -(-(M + reach) // T)
        return above + -(-M // T) + -(-reach // T)

    def init_state(self, batch_size: int, dtype=None) -> State:
        """Empty memory; of no slots where memory_length is 0."""
        config, dtype = self.config, dtype or self.dtype()
        first = config.depth, batch_size

        def zeros(positions, channels):
            return jnp.zeros((*first, positions, channels), dtype)

        return State(
            zeros(config.memory_length, config.d_model),
            tuple(zeros(*shape) for shape in config.context_widths),
            jnp.zeros(batch_size, jnp.int32),
        )

    def state_axes(self) -> State:
        contexts = [("layers", "batch", None, name) for name in ("embed", "mlp")]
        return State(
            memory_lib.STATE_AXES.hidden_LBMD,
            tuple(contexts[: len(self.config.context_widths)]),
            ("batch",),
        )

    def param_axes(self, params):
        tables = attention.PARAM_AXES | feed_forward.PARAM_AXES | adaptive.PARAM_AXES
        return parameters.param_axes(
            params, tables | separable.PARAM_AXES | signals.PARAM_AXES
        )

    def matrices(self, params):
        layers = attention.MATRICES | feed_forward.MATRICES | separable.MATRICES
        return sides.by_name(params, layers)

    def for_generation(self) -> Model:
        """Every token sees memory_length positions and itself.

        Without a memory it is the model on the last context_length tokens, which slide.
        """
        config = self.config
        if self.causal and not config.memory_length:
            # Learned positions are no more than their table's.
            rows = config.table_length or config.context_length
            model = self.for_reading(extended_length=0)
            return Windowed.of(model, min(config.context_length, rows))
        super().for_generation()
        M, window = config.memory_length, config.window
        return self.for_reading(window=M if window is None else min(window, M))

    def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
        checks.heads(self.config, mesh)

    def flops(self, **options) -> flops_lib.Flops:
        return flops_lib.segment(self.config, **options)

    def kept_for_backward(self) -> float:
        return flops_lib.kept_for_backward(self.config)

    def summed_activations(self) -> float:
        return flops_lib.summed_activations(self.config)

    def to_save_memory(self) -> dict:
        return {} if self.config.remat != "none" else {"remat": "full"}

    def card(self) -> dict:
        config = self.config
        found = {"window": config.window, "n_step": config.steps, "act": config.act}
        return {**super().card(), **found}
