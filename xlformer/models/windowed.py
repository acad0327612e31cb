"""A model without memory, continued by a window of its last tokens.

    model = Windowed.of(inner, window=512)

What carries nothing from call to call can only be asked again. The state of a row is
its last tokens, and what comes next is what the model says of them alone: exactly
inner.log_probs of the last `window` tokens, the first of which is as if it began a
text. A longer text slides through. Each token costs as much as a whole window.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlformer.layers import memory as memory_lib
from xlformer.models.base import Aux, Model
from xlformer.models.tokens import TokenModel


class Window(NamedTuple):
    """The tokens before the next one, oldest first.

    Attributes:
      ids_BM: only the last length_B[b] of row b count; M is one less than the window,
        which has the token in it that is asked about.
      length_B: int32.
    """

    ids_BM: Any
    length_B: Any


@dataclasses.dataclass(frozen=True)
class WindowedConfig:
    """The model that is asked, and how many tokens it is given each time."""

    model: Model
    window: int

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size


class Windowed(Model):
    """For reading: it draws no random numbers, and `apply` has no aux."""

    Config = WindowedConfig

    @classmethod
    def of(cls, model: Model, window: int) -> Windowed:
        """The model that sees `window` tokens, the newest among them."""
        return cls(WindowedConfig(model, window))

    @property
    def memory_length(self) -> int:
        return self.config.window - 1

    @property
    def sight(self) -> int:
        return self.config.window

    @property
    def positions_from_end(self) -> bool:
        return self.config.model.positions_from_end

    @property
    def needs_rngs(self) -> bool:
        return False

    def dtype(self, params):
        return self.config.model.dtype(params)

    def replay(self, segment_length: int) -> int:
        """Tokens alone are carried, so that one window of them is all."""
        return -(-self.memory_length // segment_length)

    def for_generation(self) -> Windowed:
        return self

    def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
        self.config.model.check_mesh(mesh)

    def init(self, key: jax.Array):
        return self.config.model.init(key)

    def param_axes(self, params):
        return self.config.model.param_axes(params)

    def matrices(self, params):
        return self.config.model.matrices(params)

    def init_state(self, batch_size: int, dtype=None) -> Window:
        del dtype
        ids_BM = jnp.zeros((batch_size, self.memory_length), jnp.int32)
        return Window(ids_BM, jnp.zeros(batch_size, jnp.int32))

    def state_axes(self) -> Window:
        return Window(("batch", None), ("batch",))

    def flops(self, *, batch_size, segment_length, shares=None, cached=False):
        """Of a full window for each token."""
        del cached
        return self.config.model.flops(
            batch_size=batch_size * segment_length,
            segment_length=self.config.window,
            shares=shares,
        )

    def apply(self, params, inputs_BT, targets_BT, state, *, train=False, **options):
        del train
        options.pop("rngs", None)
        windows, state = self._windows(inputs_BT, state, **options)
        step, lengths_B = options.get("step"), options.get("lengths_B")

        def nll(part):
            *window, target_B = part
            log_probs_BV = self._ask(params, *window, step)
            return -jnp.take_along_axis(log_probs_BV, target_B[:, None], 1)[:, 0]

        nll_BT = jax.lax.map(nll, (*windows, targets_BT.T)).T
        if lengths_B is not None:
            valid_BT = jnp.arange(inputs_BT.shape[1])[None] < _column(lengths_B)
            nll_BT = jnp.where(valid_BT, nll_BT, 0)
        return nll_BT, state, Aux(jnp.zeros((), nll_BT.dtype), {})

    def log_probs(self, params, inputs_BT, state, **options):
        windows, state = self._windows(inputs_BT, state, **options)
        step = options.get("step")
        log_probs_TBV = jax.lax.map(
            lambda part: self._ask(params, *part, step), windows
        )
        return jnp.swapaxes(log_probs_TBV, 0, 1), state

    def _windows(self, ids_BT, state: Window, *, resets_BT=None, lengths_B=None, **_):
        """(ids_TBW, how many of them count [T, B]) of each token, and the new state."""
        T, W, M = ids_BT.shape[1], self.config.window, self.memory_length
        resets_BT = memory_lib.expand_resets(resets_BT, T)
        end = T if lengths_B is None else jnp.asarray(lengths_B, jnp.int32)
        both_BS = jnp.concatenate([state.ids_BM, ids_BT], 1)
        start_BT = memory_lib.key_start(state.length_B, resets_BT, M=M, T=T)
        # The last W of those that may be seen, moved to the front: padding is behind.
        start_BT = jnp.maximum(start_BT, jnp.arange(T)[None])
        count_TB = (M + 1 + jnp.arange(T)[None] - start_BT).T
        index_TBW = start_BT.T[..., None] + jnp.arange(W)[None, None]
        index_TBW = jnp.minimum(index_TBW, both_BS.shape[1] - 1)
        ids_TBW = jax.vmap(lambda index_BW: jnp.take_along_axis(both_BS, index_BW, 1))(
            index_TBW
        )
        length_B = memory_lib.next_length(state.length_B, resets_BT, end, M=M)
        ids_BM = memory_lib.append(state.ids_BM, ids_BT, end)
        return (ids_TBW, count_TB), Window(ids_BM, length_B)

    def _ask(self, params, ids_BW, count_B, step):
        """log p of what follows the last token that counts, [B, V]."""
        model, last_B11 = self.config.model, (count_B - 1)[:, None, None]
        state = model.init_state(ids_BW.shape[0], self.dtype(params))
        if not isinstance(model, TokenModel):
            log_probs_BWV, _ = model.log_probs(
                params, ids_BW, state, lengths_B=count_B, step=step
            )
            return jnp.take_along_axis(log_probs_BWV, last_B11, 1)[:, 0]

        # The softmax of one token: that of a whole window is W V numbers a row.
        def run(module, ids_BW, state, **options):
            y_BWD, state, _ = module._forward(ids_BW, state, **options)
            y_BD = jnp.take_along_axis(y_BWD, last_B11, 1)[:, 0]
            return module.softmax.log_probs(y_BD, module.embedding), state

        options = model._options(ids_BW, None, count_B, step)
        return model._run(params, run, ids_BW, state, **options)[0]


def _column(lengths_B):
    return jnp.reshape(jnp.asarray(lengths_B), (-1, 1))
