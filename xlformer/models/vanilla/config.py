"""The configuration of the vanilla Transformer: every field, checked at once."""

from __future__ import annotations

import dataclasses

from xlformer.errors import UserError
from xlformer.fields import FREE, REFUSED, TAKEN, Rule
from xlformer.kernels.relative_attention import IMPLEMENTATIONS
from xlformer.kernels.visibility import Visibility
from xlformer.layers.adaptive import Bins
from xlformer.layers.stack import REMAT
from xlformer.models import checks

_SIZE = Rule(REFUSED, least=1)
_LENGTH = Rule(REFUSED, least=0)
_RATE = Rule(TAKEN, least=0, below=1)
# Of each field: its range, and whether a run may change it.
RULES = {
    "vocab_size": _SIZE,
    "n_layer": _SIZE,
    "d_model": _SIZE,
    "n_head": _SIZE,
    "d_head": _LENGTH,
    "d_inner": _SIZE,
    "context_length": _SIZE,
    "extended_length": _LENGTH,
    "attention_bias": Rule(REFUSED),
    "layer_losses": Rule(REFUSED),
    # Another weight counts from here on; none at all has other parameters.
    "second_target_weight": Rule(TAKEN, least=0, switch=True),
    "loss_steps": Rule(TAKEN, least=0),
    "dropout": _RATE,
    "attention_dropout": _RATE,
    "norm_epsilon": Rule(REFUSED, above=0),
    "init_std": Rule(REFUSED, least=0),
    "dtype": Rule(TAKEN, choices=("auto", "float32", "bfloat16", "float64")),
    "scan_layers": Rule(FREE),
    "remat": Rule(FREE, choices=REMAT),
    "attention": Rule(FREE, choices=("auto", *IMPLEMENTATIONS)),
}


@dataclasses.dataclass(frozen=True)
class VanillaConfig:
    """Shapes and options of one vanilla Transformer.

    The defaults are the sizes of the paper's 12 layers, T12. Raises UserError for a
    wrong type or an impossible combination.
    """

    vocab_size: int | None = None  # token ids; None: the data decides
    n_layer: int = 12
    d_model: int = 512
    n_head: int = 2
    d_head: int = 0  # 0: d_model / n_head
    d_inner: int = 2048
    context_length: int = 512  # rows of each layer's table of positions
    extended_length: int = 0  # leading inputs without a target: `evaluate --stride`
    attention_bias: bool = False  # of its four projections
    layer_losses: bool = True  # in training each layer predicts, too
    second_target_weight: float = 0.5  # of the target after next in training; 0: none
    loss_steps: int = 0  # over which the layers' losses end; 0: the run's steps
    dropout: float = 0.2  # of the hidden units of feed-forward
    attention_dropout: float = 0.2
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    dtype: str = "auto"  # to compute in; parameters are float32
    scan_layers: bool = False  # one compiled layer, looped; else unrolled
    remat: str = "none"  # recompute layers in backward: full, or all but attention
    attention: str = "auto"  # implementation of the attention operation

    RULES = RULES  # not annotated: no field

    @property
    def head_width(self) -> int:
        """d_head, derived from d_model if it is 0."""
        return self.d_head or self.d_model // self.n_head

    @property
    def classified(self) -> tuple[int, int]:
        """How many layers have a classifier for training alone: (next, after next).

        The last layer's classifier of the next token is the model's own.
        """
        layers = self.n_layer if self.layer_losses else 1
        return layers - 1, layers if self.second_target_weight else 0

    @property
    def bins(self) -> Bins:
        """The shapes of the tables of embedding and softmax; needs vocab_size."""
        return Bins(self.vocab_size, self.d_model, self.d_model)

    def visibility(self, key_start_BT=None) -> Visibility:
        """What a token sees, from its row's last reset on."""
        return Visibility(None, key_start_BT)

    def tiny(self) -> VanillaConfig:
        """Returns a model with these options that a CPU trains in seconds: ':debug'."""
        return dataclasses.replace(
            self,
            n_layer=2,
            d_model=16,
            n_head=2,
            d_head=8,
            d_inner=32,
            context_length=11,
            extended_length=3 if self.extended_length else 0,
        )

    def __post_init__(self):
        checks.fields(self)
        if not self.d_head and self.d_model % self.n_head:
            raise UserError(
                f"config.model.n_head={self.n_head} does not divide "
                f"config.model.d_model={self.d_model}; set d_head"
            )
        if self.extended_length >= self.context_length:
            raise UserError(
                f"config.model.extended_length={self.extended_length} must be below "
                f"config.model.context_length={self.context_length}: no target is left"
            )
