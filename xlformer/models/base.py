"""The contract: a language model is a pure function with carried state.

    params = model.init(key)
    state = model.init_state(batch_size)
    nll_BT, state, aux = model.apply(params, inputs_BT, targets_BT, state)

Training, evaluation, generation and `testing.check_model` know nothing else.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlformer.errors import UserError
from xlformer.kernels.dropout import Keys
from xlformer.layers.memory import expand_resets


class Aux(NamedTuple):
    """What a model returns beside the nll.

    Attributes:
      loss: scalar to add to the mean nll (already weighted).
      metrics: dict of scalars that are only logged.
    """

    loss: Any
    metrics: dict


def compute_dtype(name: str, params=None):
    """The dtype to compute in: float64 if the parameters are, else what `name` says.

    'auto' is bfloat16 where it is native (TPU, compute capability >= 8.0), else
    float32.
    """
    leaves = jax.tree.leaves(params)
    if any(leaf.dtype == jnp.float64 for leaf in leaves):
        return jnp.dtype("float64")
    if name != "auto":
        return jnp.dtype(name)
    device = jax.devices()[0]
    native = device.platform == "tpu" or (
        device.platform == "gpu" and float(device.compute_capability) >= 8.0
    )
    return jnp.dtype(jnp.bfloat16 if native else jnp.float32)


def param_axes(params, table: Mapping[str, tuple]):
    """Logical axis names of parameters by the end of their path.

    Args:
      params: a tree of arrays or shapes.
      table: names by 'module/parameter'; a number at the end of the parameter does not
        count ('embedding/table' is table_0 too). Leaves under 'layers' have one more
        axis in front. What is not in the table is not split.
    """

    def name(path, leaf):
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        last = re.sub(r"_\d+$", "", "/".join(keys[-2:]))
        names = table.get(last, (None,) * (len(leaf.shape) - ("layers" in keys)))
        return (None,) * ("layers" in keys) + tuple(names)

    return jax.tree_util.tree_map_with_path(name, params)


@dataclasses.dataclass(frozen=True)
class Model:
    """A frozen configuration and the pure functions that it defines.

    Subclasses define `_module`, `memory_length`, `init_state` and `state_axes`. The
    Linen module scores when called, and has the methods `log_probs` and `run_trunk`;
    the latter reads only the parameters under 'trunk'.
    """

    config: Any

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.config.vocab_size

    @property
    def memory_length(self) -> int | None:
        """How many earlier positions each layer sees; None is without limit."""
        raise NotImplementedError

    @property
    def extended_length(self) -> int:
        """How many leading inputs are recomputed context without a target."""
        return 0

    @property
    def segments_equal_one_pass(self) -> bool:
        """Whether segments of any sizes give what one pass over all of them gives.

        That is promised as long as no segment starts later than memory_length; from
        there on a bounded memory has lost what one pass still sees. False for absolute
        positions, which count anew in each segment.
        """
        return True

    @property
    def positions_from_end(self) -> bool:
        """Whether an output depends on how many inputs of its segment follow.

        So it does where absolute positions count backwards. Where True, scoring says
        with lengths_B where the text ends; else it need not.
        """
        return True

    def replay(self, segment_length: int) -> int | None:
        """Segments that scoring replays before a row to carry what one row would have.

        None is without limit: what is true of any state if nothing is known of it but
        how many positions a layer sees, because layers reach back through layers. 0 is
        no state. Extended context counts: a row's first inputs see nothing before it.
        """
        if self.memory_length == 0:
            return -(-self.extended_length // segment_length)
        return None

    @property
    def width(self) -> int:
        """Of the vectors that the trunk takes."""
        return self.config.d_model

    @property
    def resets_in_segment(self) -> bool:
        """Whether a reset may lie inside a segment; else only before it, as [B, 1]."""
        return True

    @property
    def trunk(self) -> Trunk:
        """The same machine without tokens: vectors in, vectors out."""
        return Trunk(self)

    def init(self, key: jax.Array):
        """Fresh parameters, the bare tree, float32."""
        module = self._module(jnp.dtype(jnp.float32))
        ids_BT = jnp.zeros((1, 1), jnp.int32)
        state = self.init_state(1, dtype=jnp.float32)
        params = module.init(key, ids_BT, ids_BT, state)["params"]
        # Flax's initialisers follow jax_enable_x64.
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    def init_state(self, batch_size: int, dtype=None):
        """The state before the first token: fixed shapes, nothing valid in it.

        dtype defaults to the compute dtype; `apply` returns the state in the dtype that
        it computed in.
        """
        raise NotImplementedError

    def state_axes(self):
        """Logical axis names of each leaf of the state; 'batch' is among them."""
        raise NotImplementedError

    def to_cache(self, params, state, *, segment_length: int = 1):
        """The state in the form that scoring and generation like; by default itself.

        `apply`, `log_probs` and the trunk take it and return the same form, and give
        the numbers that they give for `state`. It belongs to these parameters: it may
        hold what was computed from them, so it passes no gradients on to them, knows
        no dropout, and has no place in a checkpoint.

        Args:
          params: those that will be used with it.
          state: of `init_state`, or what `apply` returned for one.
          segment_length: the most inputs of a call. With 1 all rows advance together:
            no lengths_B.
        """
        del params, segment_length
        return state

    def cache_axes(self, *, segment_length: int = 1):
        """As state_axes, for what `to_cache` returns; a leaf may be of all rows."""
        del segment_length
        return self.state_axes()

    def param_axes(self, params):
        """Logical axis names of each leaf of `params`, a tree of arrays or shapes.

        sharding.RULES says which names a mesh splits. By default nothing is split.
        """
        return jax.tree.map(lambda leaf: (None,) * len(leaf.shape), params)

    def apply(
        self,
        params,
        inputs_BT: jax.Array,
        targets_BT: jax.Array,
        state,
        *,
        resets_BT: jax.Array | None = None,
        lengths_B: jax.Array | int | None = None,
        step: jax.Array | None = None,
        train: bool = False,
        rngs: dict | None = None,
    ):
        """Scores the targets and carries the state over the segment.

        Args:
          params: what `init` returns.
          inputs_BT: token ids. With extended_length E up to E more than targets; the
            extra ones lead.
          targets_BT: the next token of each of the last inputs.
          state: of `init_state`, or of the call before.
          resets_BT: true where a token and all after it see nothing before it; [B, 1]
            is a reset before the segment, the only form if not resets_in_segment.
          lengths_B: valid inputs of each row, or one number; the rest is padding on
            the right: it enters no memory and its nll is 0.
          step: for schedules inside a model.
          train: dropout on; needs rngs if any rate is positive.
          rngs: 'dropout', one key; and 'rows', a key for each row, [B], by default
            folded from it. What differs between rows must be drawn from 'rows': under a
            mesh each device calls this with its own rows.

        Returns:
          nll_BT in nats, in position order; the new state, without gradient; Aux.
        """
        del step  # No schedule inside this family.
        extra = inputs_BT.shape[1] - targets_BT.shape[1]
        if not 0 <= extra <= self.extended_length:
            raise UserError(
                f"inputs_BT has {inputs_BT.shape[1]} tokens and targets_BT "
                f"{targets_BT.shape[1]}: config.model.extended_length="
                f"{self.extended_length} allows at most that many more inputs"
            )
        params = _arrays(params)
        nll_BT, state = self._module(compute_dtype(self.config.dtype, params)).apply(
            {"params": params},
            inputs_BT,
            targets_BT,
            jax.lax.stop_gradient(state),
            resets_BT=self._resets(resets_BT, inputs_BT.shape[1]),
            lengths=_lengths(lengths_B),
            keys=self._dropout_keys(train, rngs, inputs_BT.shape[0]),
        )
        return (
            nll_BT,
            jax.lax.stop_gradient(state),
            Aux(jnp.zeros((), nll_BT.dtype), {}),
        )

    def log_probs(self, params, inputs_BT, state, *, resets_BT=None, lengths_B=None):
        """log p of every next token, [B, T, V], and the new state.

        For generation and small vocabularies: T x V numbers a row.
        """
        params = _arrays(params)
        module = self._module(compute_dtype(self.config.dtype, params))
        log_probs_BTV, state = module.apply(
            {"params": params},
            inputs_BT,
            jax.lax.stop_gradient(state),
            resets_BT=self._resets(resets_BT, inputs_BT.shape[1]),
            lengths=_lengths(lengths_B),
            method="log_probs",
        )
        return log_probs_BTV, jax.lax.stop_gradient(state)

    def _resets(self, resets_BT, T: int):
        """[B, T] or None; an error where the model cannot express them."""
        if resets_BT is not None and resets_BT.shape[1] > 1:
            if not self.resets_in_segment:
                raise UserError(
                    f"resets_BT has {resets_BT.shape[1]} columns, but this model can "
                    "reset only before a segment, [B, 1]: resets_in_segment is False"
                )
        return expand_resets(resets_BT, T)

    def _dropout_keys(self, train: bool, rngs: dict | None, B: int) -> Keys | None:
        if not train or not self._has_dropout:
            return None
        if not rngs or "dropout" not in rngs:
            raise ValueError("train=True with dropout needs rngs={'dropout': key}")
        key = rngs["dropout"]
        rows_B = rngs.get("rows")
        if rows_B is None:
            rows_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
        return Keys(key, rows_B)

    @property
    def _has_dropout(self) -> bool:
        return bool(self.config.dropout)

    def _module(self, dtype) -> nn.Module:
        raise NotImplementedError


def _arrays(params):
    """Of JAX, where they are numpy's: those cannot be indexed while tracing."""
    return jax.tree.map(jnp.asarray, params)


def _lengths(lengths_B):
    if lengths_B is None:
        return None
    lengths = jnp.asarray(lengths_B, jnp.int32)
    if lengths.ndim > 1:
        raise ValueError(
            f"lengths_B has shape {lengths.shape}, expected [B] or a number"
        )
    return lengths


@dataclasses.dataclass(frozen=True)
class Trunk:
    """A model without embedding and softmax, for people who bring vectors.

    `apply` takes the model's whole parameter tree or the trunk's part of it, which
    `init` makes alone. Where there are no tokens, build the model with vocab_size=1.
    """

    model: Model

    def init(self, key: jax.Array):
        """Fresh parameters of the trunk alone."""
        return self.model.init(key)["trunk"]

    def init_state(self, batch_size: int, dtype=None):
        """As the model's."""
        return self.model.init_state(batch_size, dtype)

    def apply(
        self,
        params,
        x_BTD: jax.Array,
        state,
        *,
        resets_BT=None,
        lengths_B=None,
        step=None,
        train: bool = False,
        rngs: dict | None = None,
    ):
        """Vectors in, vectors of the last layer out, and the new state.

        Args are those of `Model.apply`; gradients flow into x_BTD, not into the state.
        """
        del step
        params = _arrays(params.get("trunk", params))
        dtype = compute_dtype(self.model.config.dtype, params)
        y_BTD, state = self.model._module(dtype).apply(
            {"params": {"trunk": params}},
            x_BTD.astype(dtype),
            jax.lax.stop_gradient(state),
            resets_BT=self.model._resets(resets_BT, x_BTD.shape[1]),
            lengths=_lengths(lengths_B),
            keys=self.model._dropout_keys(train, rngs, x_BTD.shape[0]),
            method="run_trunk",
        )
        return y_BTD, jax.lax.stop_gradient(state)
