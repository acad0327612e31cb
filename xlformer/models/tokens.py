"""Any stack of layers over vectors as a language model: embedding, softmax, padding.

What is between the two, the trunk, is a Linen module that knows of no tokens:

    y_BTD, state, aux = trunk(
        x_BTD, state, resets_BT=..., lengths=..., step=..., train=..., keys=...)

resets_BT is [B, T] or None; lengths None, a number or [B]; keys a kernels.dropout.Keys
in training, None where nothing is drawn. This module knows no system.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlformer.errors import UserError
from xlformer.kernels import watching
from xlformer.kernels.dropout import Keys, bernoulli, fold
from xlformer.layers.adaptive import (
    AdaptiveEmbedding,
    AdaptiveSoftmax,
    Bins,
    drop_words,
)
from xlformer.layers.memory import expand_resets
from xlformer.models.base import Aux, Model, compute_dtype
from xlformer.sharding import constrain

# Folded into the key that rows share, for the words that are left out: beyond all row
# numbers, which are folded into the same key. A trunk folds in numbers above it.
WORDS_KEY = 1 << 24


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How token ids become vectors, and vectors probabilities.

    Attributes:
      bins: the shapes of the tables.
      softmax_bins: of the softmax's, where its vectors have another width and nothing
        is tied; None is bins.
      scale: factor of the embeddings.
      tie_weights: whether the softmax uses the tables of the embedding.
      tie_projections: whether it uses its projections, one a bin; () ties none.
      word_dropout: the rate at which training leaves out words: all their occurrences,
        in all rows, on the input side alone. The model then says needs_rngs.
      table_init, projection_init, cluster_init: how the parameters begin; by default
        as in the PyTorch original (init_std 0.02, proj_init_std 0.01).
    """

    bins: Bins
    softmax_bins: Bins | None = None
    scale: float = 1.0
    tie_weights: bool = True
    tie_projections: tuple[bool, ...] = ()
    word_dropout: float = 0.0
    table_init: Any = nn.initializers.normal(0.02)
    projection_init: Any = nn.initializers.normal(0.01)
    cluster_init: Any = nn.initializers.normal(0.02)


class TokenModule(nn.Module):
    """Embedding, trunk and softmax; its parameters are under these three names."""

    trunk: nn.Module
    tokens: Tokens
    dtype: Any

    def setup(self):
        tokens = self.tokens
        inits = tokens.table_init, tokens.projection_init
        self.embedding = AdaptiveEmbedding(tokens.bins, *inits, self.dtype)
        self.softmax = AdaptiveSoftmax(
            tokens.softmax_bins or tokens.bins,
            tokens.tie_weights,
            tokens.tie_projections,
            *inits,
            tokens.cluster_init,
            self.dtype,
        )

    def __call__(self, ids_BT, targets_BT, state, *, lengths=None, **options):
        y_BTD, state, aux = self._forward(ids_BT, state, lengths=lengths, **options)
        B, T = targets_BT.shape
        # Leading inputs beyond the targets are extended context, and are not scored.
        h_ND = y_BTD[:, -T:].reshape(B * T, -1)
        nll_N = self.softmax(h_ND, targets_BT.reshape(-1), self.embedding)
        nll_BT = nll_N.reshape(B, T)
        if lengths is not None:
            index_BT = jnp.arange(ids_BT.shape[1] - T, ids_BT.shape[1])[None]
            valid_BT = index_BT < jnp.broadcast_to(lengths, (B,))[:, None]
            # Not a product with 0: what padding gives may be NaN.
            nll_BT = jnp.where(valid_BT, nll_BT, 0)
        return nll_BT, state, aux

    def log_probs(self, ids_BT, state, **options):
        y_BTD, state, _ = self._forward(ids_BT, state, **options)
        B, T, D = y_BTD.shape
        log_p_NV = self.softmax.log_probs(y_BTD.reshape(B * T, D), self.embedding)
        return log_p_NV.reshape(B, T, -1), state

    def run_trunk(
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
        return self.trunk(
            x_BTD,
            state,
            resets_BT=resets_BT,
            lengths=lengths,
            step=step,
            train=train,
            keys=keys,
        )

    def _forward(self, ids_BT, state, *, keys=None, **options):
        tokens = self.tokens
        x_BTD = self.embedding(ids_BT) * tokens.scale
        if keys is not None and tokens.word_dropout:
            key = fold(keys.shared, WORDS_KEY)
            keep_V = bernoulli(key, 1 - tokens.word_dropout, (tokens.bins.vocab_size,))
            x_BTD = drop_words(x_BTD, ids_BT, keep_V, tokens.word_dropout)
        # Rows stay where they are; the width is whole on every device, because each
        # layer reads all of it.
        x_BTD = constrain(x_BTD, "batch", None, None)
        return self.run_trunk(x_BTD, state, keys=keys, **options)


class TokenModel(Model):
    """A trunk behind the contract of `Model`.

    Subclasses define `trunk_module`, `init_state` and `state_axes`, and `tokens` where
    one plain table, tied, is not what they want. The config has vocab_size, d_model,
    and perhaps dropout and dtype.
    """

    def trunk_module(self, dtype) -> nn.Module:
        """The Linen module between embedding and softmax, which computes in dtype."""
        raise NotImplementedError

    def tokens(self) -> Tokens:
        """What is around the trunk."""
        return Tokens(Bins(self.vocab_size, self.width, self.width))

    @property
    def width(self) -> int:
        return self.config.d_model

    @property
    def trunk(self) -> Trunk:
        return Trunk(self)

    def dtype(self, params=None):
        return compute_dtype(getattr(self.config, "dtype", "auto"), params)

    def matrices(self, params):
        """Those of the trunk alone: Muon leaves embedding and softmax to Adam."""
        none = jax.tree.map(lambda _: None, params)
        return none | super().matrices(
            {k: params[k] for k in ("trunk",) if k in params}
        )

    def init(self, key: jax.Array):
        """Fresh parameters: the bare tree, without Flax's 'params' level, float32."""
        # No parameter's shape depends on the number of rows or tokens: one will do.
        ids_BT = jnp.zeros((1, 1), jnp.int32)
        state = self.init_state(1, dtype=jnp.float32)
        module = self._module(jnp.dtype(jnp.float32))
        params = module.init(key, ids_BT, ids_BT, state)["params"]
        # Flax's initialisers follow jax_enable_x64, and float64 parameters would turn
        # the whole computation into one of float64.
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    def apply(
        self,
        params,
        inputs_BT,
        targets_BT,
        state,
        *,
        resets_BT=None,
        lengths_B=None,
        step=None,
        train=False,
        rngs=None,
    ):
        extra = inputs_BT.shape[1] - targets_BT.shape[1]
        if not 0 <= extra <= self.extended_length:
            raise UserError(
                f"inputs_BT has {inputs_BT.shape[1]} tokens and targets_BT "
                f"{targets_BT.shape[1]}: config.model.extended_length="
                f"{self.extended_length} allows at most that many more inputs"
            )
        options = self._options(inputs_BT, resets_BT, lengths_B, step, train, rngs)
        arrays = inputs_BT, targets_BT
        nll_BT, state, aux = self._run(params, None, *arrays, state, **options)
        return nll_BT, state, _scalars(aux, nll_BT.dtype)

    def log_probs(
        self, params, inputs_BT, state, *, resets_BT=None, lengths_B=None, step=None
    ):
        options = self._options(inputs_BT, resets_BT, lengths_B, step)
        return self._run(params, "log_probs", inputs_BT, state, **options)

    def inspect(self, params, inputs_BT, state, *, resets_BT=None, step=None):
        arrays, options = (inputs_BT, inputs_BT, state), {"step": step}
        with watching.watch() as told:
            _, state, _ = self.apply(params, *arrays, resets_BT=resets_BT, **options)
        found = watching.Inside({}, {}, {})
        kinds = (watching.ByDistance, watching.Gate, watching.Running)
        for one in told:
            into = found[kinds.index(type(one.value))]
            name = self.layer_name(one.at)
            into[f"{name}, {one.name}" if one.name else name] = one.value
        return found, state

    def layer_name(self, at: tuple[int, ...]) -> str:
        """What people call the layer that told something (watching.Told.at)."""
        return ", ".join(f"layer {number + 1}" for number in at)

    def _module(self, dtype) -> TokenModule:
        return TokenModule(self.trunk_module(dtype), self.tokens(), dtype)

    def _run(self, params, method, *arrays, **options):
        """A method of the module; its last array and its second result are states."""
        *arrays, state = arrays
        # numpy arrays, which parameters may be, cannot be indexed by traced values.
        params = jax.tree.map(jnp.asarray, params)
        # Gradients end at both sides of a segment, whatever the trunk does: into the
        # state that is given (Dai et al. 2019, SG), and out of the one that is returned
        # where several segments are in one function.
        first, state, *rest = self._module(self.dtype(params)).apply(
            {"params": params},
            *arrays,
            jax.lax.stop_gradient(state),
            method=method,
            **options,
        )
        return first, jax.lax.stop_gradient(state), *rest

    def _options(self, x_BT, resets_BT, lengths_B, step, train=False, rngs=None):
        """What the module takes, of what `apply` takes."""
        B, T = x_BT.shape[:2]
        if resets_BT is not None and resets_BT.shape[1] > 1:
            if not self.resets_in_segment:
                raise UserError(
                    f"resets_BT has {resets_BT.shape[1]} columns, but this model can "
                    "reset only before a segment, [B, 1]: resets_in_segment is False"
                )
        return {
            "resets_BT": expand_resets(resets_BT, T),
            "lengths": _lengths(lengths_B),
            "step": step,
            "train": train,
            "keys": _keys(rngs, B) if train and self.needs_rngs else None,
        }


@dataclasses.dataclass(frozen=True)
class Trunk:
    """A model without embedding and softmax, for people who bring vectors.

    `apply` takes the model's whole parameter tree or the trunk's part of it, which
    `init` makes alone. Where there are no tokens, build the model with vocab_size=1.
    """

    model: TokenModel

    def init(self, key: jax.Array):
        """Fresh parameters of the trunk alone."""
        return self.model.init(key)["trunk"]

    def init_state(self, batch_size: int, dtype=None):
        """The state before the first token, which is the model's own."""
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
        """Vectors in; vectors of the last layer out, the new state, and Aux.

        Args are those of `Model.apply`; gradients flow into x_BTD, not into the state.
        """
        params = params.get("trunk", params)
        options = self.model._options(x_BTD, resets_BT, lengths_B, step, train, rngs)
        # float32 vectors would pull a computation in bfloat16 up to theirs.
        x_BTD = x_BTD.astype(self.model.dtype(params))
        y_BTD, state, aux = self.model._run(
            {"trunk": params}, "run_trunk", x_BTD, state, **options
        )
        return y_BTD, state, _scalars(aux, y_BTD.dtype)


def _scalars(aux: Aux, dtype) -> Aux:
    """Makes the loss of a trunk, which may be the number 0.0, an array with a dtype.

    It is at least float32, like the mean nll that it is added to.
    """
    dtype = jnp.promote_types(dtype, jnp.float32)
    return aux._replace(loss=jnp.asarray(aux.loss, dtype))


def _keys(rngs: dict | None, B: int) -> Keys:
    if not rngs or "dropout" not in rngs:
        raise ValueError("train=True with dropout needs rngs={'dropout': key}")
    key = rngs["dropout"]
    rows_B = rngs.get("rows")
    # Right only where one call has all the rows. Under a mesh and in micro-batches the
    # training step passes the keys, or row 0 of every group would drop the same units.
    if rows_B is None:
        rows_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    return Keys(key, rows_B)


def _lengths(lengths_B):
    if lengths_B is None:
        return None
    lengths = jnp.asarray(lengths_B, jnp.int32)
    if lengths.ndim > 1:
        raise ValueError(
            f"lengths_B has shape {lengths.shape}, expected [B] or a number"
        )
    return lengths
