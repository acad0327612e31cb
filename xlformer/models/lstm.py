"""LSTM language models: AWD-LSTM (Merity et al. 2018, arXiv:1708.02182) and plain ones.

A stack of LSTM layers of widths e, n, ..., n, e between an embedding and a softmax that
are tied, or e, n, ..., n untied; state (h, c). The plain form has dropout alone. AWD-
LSTM drops recurrent weights (one mask a step of training, for all rows), vectors (one
mask a row and segment, the same at every token) and whole words, and adds the penalties
AR and TAR to the loss.

As in the original program: two biases a layer, one uniform initialisation, AR of the
dropped and TAR of the raw last output. Otherwise: penalties are means of each row, over
tokens that count, then over rows (equal for rows without resets and padding; the change
across a reset is none); the words that are dropped are the same in all rows, as there,
but drawn from a key that no mesh changes; the bins of a split softmax are those of
adaptive.py, whose entries in the head stand in forward order; the last word learns from
its lookup too (the program's padding_idx=-1 takes that gradient away). The paper's
fine-tuning and its pointer are not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlformer.errors import UserError
from xlformer.fields import REFUSED, TAKEN, Rule
from xlformer.kernels.dropout import bernoulli, fold
from xlformer.layers import adaptive, recurrent
from xlformer.layers.adaptive import Bins
from xlformer.layers.recurrent import LSTMState, Masks, Rates, Weights
from xlformer.models import checks, parameters, sides
from xlformer.models.base import Aux
from xlformer.models.tokens import WORDS_KEY, TokenModel, Tokens

_SIZE = Rule(REFUSED, least=1)
_RATE = Rule(TAKEN, least=0, below=1)
_PENALTY = Rule(TAKEN, least=0)
# Of each field: its range, and whether a run may change it. The state and the weights
# of a checkpoint fit only the fields that are REFUSED.
RULES = {
    "vocab_size": _SIZE,
    "n_layer": _SIZE,
    "d_model": _SIZE,
    "d_hidden": _SIZE,
    "tie_weights": Rule(REFUSED),
    "cutoffs": Rule(REFUSED),
    "dropout": _RATE,
    "hidden_dropout": _RATE,
    "input_dropout": _RATE,
    "word_dropout": _RATE,
    "weight_dropout": _RATE,
    "activation_penalty": _PENALTY,
    "temporal_penalty": _PENALTY,
    "init_range": Rule(REFUSED, least=0),
    "dtype": Rule(TAKEN, choices=("auto", "float32", "bfloat16", "float64")),
}
# Folded into the key that rows share, for the recurrent weights: see tokens.WORDS_KEY.
WEIGHTS_KEY = 2 * WORDS_KEY


@dataclasses.dataclass(frozen=True)
class LSTMConfig:
    """Shapes and options of one LSTM; the names of AWD-LSTM's program in comments.

    The defaults are the sizes of its Penn Treebank run in the plain form. Raises
    UserError for a wrong type or an impossible combination.
    """

    vocab_size: int | None = None  # token ids; None: the data decides
    n_layer: int = 3  # nlayers
    d_model: int = 400  # emsize, the width of the embeddings
    d_hidden: int = 1150  # nhid; the last layer of a tied model has d_model
    tie_weights: bool = True  # tied
    cutoffs: tuple[int, ...] = ()  # splits: first ids of the tails of the softmax
    dropout: float = 0.1  # of the last output
    hidden_dropout: float = 0.0  # dropouth: between layers
    input_dropout: float = 0.0  # dropouti: of the embeddings' units
    word_dropout: float = 0.0  # dropoute: of whole words
    weight_dropout: float = 0.0  # wdrop: of the recurrent weights
    activation_penalty: float = 0.0  # alpha, AR: of the last output's squares
    temporal_penalty: float = 0.0  # beta, TAR: of the squares of its changes
    init_range: float = 0.1  # of the tables; a layer of n units has 1/sqrt(n)
    dtype: str = "auto"  # to compute in; parameters are float32

    RULES = RULES  # not annotated: no field

    @property
    def widths(self) -> tuple[int, ...]:
        """How wide the input of the first layer is, and the output of each."""
        inner = (self.d_hidden,) * (self.n_layer - 1)
        return self.d_model, *inner, self.d_model if self.tie_weights else self.d_hidden

    @property
    def rates(self) -> Rates:
        """The rates of dropout inside the stack."""
        return Rates(
            self.input_dropout, self.hidden_dropout, self.dropout, self.weight_dropout
        )

    @property
    def softmax_bins(self) -> Bins:
        """The shapes of the softmax; needs vocab_size."""
        width = self.widths[-1]
        return Bins(self.vocab_size, width, width, self.cutoffs)

    def tiny(self) -> LSTMConfig:
        """Returns a model with these options that a CPU trains in seconds: ':debug'.

        Every size is set here, so that models of one family have equal shapes.
        """
        sizes = {"n_layer": 2, "d_model": 16, "d_hidden": 24}
        if self.cutoffs:
            sizes["cutoffs"] = (11, 19)
        return dataclasses.replace(self, **sizes)

    def __post_init__(self):
        checks.fields(self)
        checks.cutoffs(self)


class LSTMModule(nn.Module):
    """The parameters of one layer."""

    units: int

    @nn.compact
    def __call__(self, inputs: int) -> Weights:
        N, init = self.units, uniform(self.units**-0.5)
        return Weights(
            self.param("input_kernel", init, (inputs, 4, N)),
            self.param("hidden_kernel", init, (N, 4, N)),
            self.param("input_bias", init, (4, N)),
            self.param("hidden_bias", init, (4, N)),
        )


class TrunkModule(nn.Module):
    """The trunk of models.tokens."""

    config: LSTMConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BTD,
        state: LSTMState,
        *,
        resets_BT=None,
        lengths=None,
        step=None,
        train=False,
        keys=None,
    ):
        del step  # No schedule inside this model.
        config, widths = self.config, self.config.widths
        at = recurrent.places(x_BTD.shape[1], resets_BT, lengths)
        layers = [
            LSTMModule(units, name=f"lstm_{k}")(widths[k])
            for k, units in enumerate(widths[1:])
        ]
        masks = draw(config, keys)
        x_TBD = jnp.swapaxes(x_BTD.astype(self.dtype), 0, 1)
        outputs, state = recurrent.stack(x_TBD, state, layers, at, masks, config.rates)
        aux = penalties(config, outputs, at) if train else Aux(0.0, {})
        return jnp.swapaxes(outputs.dropped[-1], 0, 1), state, aux


def draw(config: LSTMConfig, keys) -> Masks:
    """What a step of training leaves in; everything where keys are None."""
    if keys is None:
        return Masks()
    rates, widths = config.rates, config.widths
    rows, B = keys.rows_B, keys.rows_B.shape[0]
    shared = fold(keys.shared, WEIGHTS_KEY)

    def one(key, number, rate, shape):
        # None where nothing is dropped, which costs nothing.
        return bernoulli(fold(key, number), 1 - rate, shape) if rate else None

    # Numbered from the input up: 0, one a layer, and the last output's.
    hidden = [
        one(rows, k, rates.hidden, (B, n)) for k, n in enumerate(widths[1:-1], start=1)
    ]
    output_BN = one(rows, config.n_layer, rates.output, (B, widths[-1]))
    weight = [one(shared, k, rates.weight, (n, 4, n)) for k, n in enumerate(widths[1:])]
    input_BD = one(rows, 0, rates.input, (B, widths[0]))
    return Masks(input_BD, tuple(hidden), output_BN, tuple(weight))


def penalties(config: LSTMConfig, outputs: recurrent.Outputs, at) -> Aux:
    """AR and TAR, weighted in the loss and as they are in the metrics."""
    found = {}
    if config.activation_penalty:
        found["lstm/ar"] = recurrent.activation_penalty(outputs.dropped[-1], at)
    if config.temporal_penalty:
        found["lstm/tar"] = recurrent.temporal_penalty(outputs.raw[-1], at)
    weights = {
        "lstm/ar": config.activation_penalty,
        "lstm/tar": config.temporal_penalty,
    }
    return Aux(sum((weights[name] * x for name, x in found.items()), 0.0), found)


class LSTM(TokenModel):
    """An LSTM behind the contract of `Model`."""

    Config = LSTMConfig

    def trunk_module(self, dtype) -> TrunkModule:
        return TrunkModule(self.config, dtype)

    def tokens(self) -> Tokens:
        config = self.config
        return Tokens(
            # Cutoffs are the softmax's: one table embeds all words.
            Bins(config.vocab_size, config.d_model, config.d_model),
            softmax_bins=config.softmax_bins,
            tie_weights=config.tie_weights,
            word_dropout=config.word_dropout,
            table_init=uniform(config.init_range),
            cluster_init=nn.initializers.zeros,
        )

    @property
    def positions_from_end(self) -> bool:
        return False

    @property
    def needs_rngs(self) -> bool:
        return bool(self.config.word_dropout or any(self.config.rates))

    def init_state(self, batch_size: int, dtype=None) -> LSTMState:
        dtype = jnp.dtype(dtype or self.dtype())
        widths = self.config.widths[1:]
        cells = jnp.promote_types(dtype, jnp.float32)
        return LSTMState(
            tuple(jnp.zeros((batch_size, n), dtype) for n in widths),
            tuple(jnp.zeros((batch_size, n), cells) for n in widths),
        )

    def state_axes(self) -> LSTMState:
        # A cell lies where its gates are made.
        axes = (("batch", "mlp"),) * self.config.n_layer
        return LSTMState(axes, axes)

    def param_axes(self, params):
        return parameters.param_axes(params, adaptive.PARAM_AXES | recurrent.PARAM_AXES)

    def matrices(self, params):
        return sides.by_name(params, recurrent.MATRICES)

    def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
        config, tensor = self.config, mesh.shape["tensor"]
        names = ["d_hidden"] if config.d_hidden in config.widths[1:] else []
        # The last layer of a tied model is as wide as the embeddings.
        names += ["d_model"] if config.tie_weights else []
        for name in names:
            size = getattr(config, name)
            if size % tensor:
                raise UserError(
                    f"config.model.{name}={size} is not divisible by "
                    f"config.mesh.tensor={tensor}: it splits the units of a layer"
                )

    def flops(self, **options) -> Flops:
        return flops(self.config, **options)

    def kept_for_backward(self) -> float:
        """Numbers a token: of each layer its inputs, gates, cell and output.

        One layer at a time has beside them its gates' inputs, and their gradients.
        """
        pairs = list(zip(self.config.widths, self.config.widths[1:], strict=False))
        return float(sum(D + 6 * N for D, N in pairs) + max(8 * N for _, N in pairs))

    def summed_activations(self) -> float:
        """Of each layer its outputs, gathered step by step, and two gradients.

        These are of the output of the step before, and of the layer's inputs.
        """
        widths = self.config.widths
        return float(2 * sum(widths[1:]) + sum(widths[:-1]))


@dataclasses.dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one segment of all rows: only matrix products count.

    Attributes:
      inputs: the layers' projections of their inputs.
      recurrence: the products inside the loops.
      vocabulary: the softmax.
    """

    inputs: float
    recurrence: float
    vocabulary: float

    @property
    def forward(self) -> float:
        return self.inputs + self.recurrence + self.vocabulary

    @property
    def training(self) -> float:
        """The gradient of a product is one more for each of its two arguments."""
        return 3 * self.forward


def flops(
    config: LSTMConfig,
    *,
    batch_size: int,
    segment_length: int,
    shares: Sequence[float] | None = None,
    cached: bool = False,
) -> Flops:
    """Counts one segment of all rows; see Model.flops."""
    del cached  # The state is what it is.
    tokens, widths = batch_size * segment_length, config.widths
    pairs = list(zip(widths, widths[1:], strict=False))
    # 2 FLOPs for each of a layer's 4 N (D + N) weights.
    return Flops(
        inputs=8.0 * tokens * sum(D * N for D, N in pairs),
        recurrence=8.0 * tokens * sum(N * N for _, N in pairs),
        vocabulary=config.softmax_bins.flops(targets=tokens, inputs=0, shares=shares),
    )


def uniform(limit: float):
    """An initialiser: uniform from -limit to limit."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init
