"""The configuration of SHA-RNN, checked at once, and what a segment costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xlformer.errors import UserError
from xlformer.fields import REFUSED, TAKEN, Rule
from xlformer.layers.adaptive import Bins
from xlformer.models import checks

_SIZE = Rule(REFUSED, least=1)
_RATE = Rule(TAKEN, least=0, below=1)
ATTENTION = ("second_last", "all", "none")
# The state and the weights of a checkpoint fit only the fields that are REFUSED.
RULES = {
    "vocab_size": _SIZE,
    "n_layer": _SIZE,
    "d_model": _SIZE,
    "d_inner": _SIZE,
    "attention": Rule(REFUSED, choices=ATTENTION),
    "memory_length": Rule(REFUSED, least=0),
    "window": Rule(REFUSED, least=0),
    "collapsed": Rule(REFUSED),
    "dropout": _RATE,
    "hidden_dropout": _RATE,
    "input_dropout": _RATE,
    "dtype": Rule(TAKEN, choices=("auto", "float32", "bfloat16", "float64")),
}


@dataclasses.dataclass(frozen=True)
class SHARNNConfig:
    """Shapes and options of one SHA-RNN; the original program's names in comments.

    The defaults are its published run's. Raises UserError for a wrong type or an
    impossible combination.
    """

    vocab_size: int | None = None  # token ids; None: the data decides
    n_layer: int = 4  # nlayers
    d_model: int = 1024  # emsize
    d_inner: int = 4096  # nhid, the width of the Boom before its sum
    attention: str = "second_last"  # use_attn: which blocks have it
    memory_length: int = 5000  # num_max_positions: the segment's own among them
    window: int | None = None  # largest visible distance; None: all of the memory
    collapsed: bool = False  # vq_collapse: one vector of values, for inference
    dropout: float = 0.1  # of the last output
    hidden_dropout: float = 0.1  # dropouth: everywhere inside the blocks
    input_dropout: float = 0.1  # dropouti: of the embeddings
    dtype: str = "auto"  # to compute in; parameters are float32

    RULES = RULES  # not annotated: no field

    @property
    def attending(self) -> tuple[int, ...]:
        """The numbers of the blocks that have attention."""
        found = {"second_last": (self.n_layer - 2,), "all": tuple(range(self.n_layer))}
        return found.get(self.attention, ())

    @property
    def chunks(self) -> int:
        """How many vectors of d_model the Boom sums."""
        return self.d_inner // self.d_model

    @property
    def std(self) -> float:
        """Of all matrices but the LSTMs' when they begin."""
        return 0.1 * self.d_model**-0.5

    @property
    def longest_segment(self) -> int | None:
        """The most tokens that see all that they may."""
        return self.memory_length - (self.window or 0) if self.attending else None

    def tiny(self) -> SHARNNConfig:
        """Returns a model with these options that a CPU trains in seconds: ':debug'."""
        sizes = {"n_layer": 2, "d_model": 16, "d_inner": 32}
        if self.memory_length:
            sizes["memory_length"] = 29
        if self.window:
            sizes["window"] = 4
        return dataclasses.replace(self, **sizes)

    def __post_init__(self):
        checks.fields(self)
        if self.d_inner % self.d_model:
            raise UserError(
                f"config.model.d_inner={self.d_inner} is no multiple of "
                f"config.model.d_model={self.d_model}: the Boom sums whole vectors"
            )
        if self.attention == "second_last" and self.n_layer < 2:
            raise UserError(
                f"config.model.attention='second_last' with config.model.n_layer="
                f"{self.n_layer}: there is no such block"
            )
        if (self.attention == "none") != (self.memory_length == 0):
            raise UserError(
                f"config.model.memory_length={self.memory_length} with config.model."
                f"attention={self.attention!r}: memory is what attention reads; 0 is "
                "that of attention='none'"
            )
        if self.window is not None and not self.window < self.memory_length:
            raise UserError(
                f"config.model.window={self.window} with config.model.memory_length="
                f"{self.memory_length}: the memory must be longer than the window"
            )
        if self.collapsed and not self.attending:
            raise UserError(
                "config.model.collapsed=True with config.model.attention='none': there "
                "is nothing to collapse"
            )


@dataclasses.dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one segment of all rows: only matrix products count.

    Attributes:
      blocks: LSTMs and Booms.
      queries: their projection, and the vector of the values, once a segment.
      own: scores and values of the segment's own vectors.
      memory: of the remembered ones.
      vocabulary: the softmax.
    """

    blocks: float
    queries: float
    own: float
    memory: float
    vocabulary: float

    @property
    def forward(self) -> float:
        return sum(dataclasses.astuple(self))

    @property
    def training(self) -> float:
        """Three times the forward, but the memory takes no gradient."""
        return 3 * (self.forward - self.memory) + 2 * self.memory


def flops(
    config: SHARNNConfig,
    *,
    batch_size: int,
    segment_length: int,
    shares: Sequence[float] | None = None,
    cached: bool = False,
) -> Flops:
    """Counts one segment of all rows with a full memory; see Model.flops."""
    del cached  # The state is what it is.
    B, T, D, A = batch_size, segment_length, config.d_model, len(config.attending)
    remembered = max(config.memory_length - T, 0)
    if config.window is not None:
        remembered = min(remembered, config.window)
    # The gates of an LSTM have 4 D (D + D) weights, a Boom has D F.
    weights = config.n_layer * D * (8 * D + config.d_inner)
    return Flops(
        blocks=2.0 * B * T * weights,
        queries=A * (2.0 * B * T * D * D + (0 if config.collapsed else 4.0 * D * D)),
        own=4.0 * A * B * D * T * (T + 1) / 2,
        memory=4.0 * A * B * D * T * remembered,
        vocabulary=Bins(config.vocab_size, D, D).flops(
            targets=B * T, inputs=B * T, shares=shares
        ),
    )


def kept_for_backward(config: SHARNNConfig) -> float:
    """Numbers a token.

    Of a block its LSTM's input, gates, cell and output, five normalised vectors with
    what dropout left of them, and of the Boom both sides of its GELU; of attention the
    query, before and after its norm and gates, the output and the own vectors. Scores
    are made again.
    """
    D, F, A = config.d_model, config.d_inner, len(config.attending)
    block = (7 + 10) * D + 3 * F
    return float(config.n_layer * block + 8 * A * D + block)


def summed_activations(config: SHARNNConfig) -> float:
    """Of each block the LSTM's outputs, gathered step by step, and two gradients.

    And the Boom's units, gathered, with the gradient of its input.
    """
    return 5.0 * config.n_layer * config.d_model
