"""The configuration of the Universal Transformer: every field, checked at once."""

from __future__ import annotations

import dataclasses
from typing import Any

from xlformer.errors import UserError
from xlformer.fields import FREE, REFUSED, TAKEN, Rule
from xlformer.kernels.relative_attention import IMPLEMENTATIONS
from xlformer.kernels.visibility import Visibility
from xlformer.layers import halting, separable
from xlformer.layers.adaptive import Bins
from xlformer.layers.attention import RELATIVE, SINUSOID
from xlformer.layers.stack import REMAT
from xlformer.models import checks

_SIZE = Rule(REFUSED, least=1)
_LENGTH = Rule(REFUSED, least=0)
_PLAIN = Rule(REFUSED)
# What only ACT reads: set without it, it is a mistake.
OF_ACT = (
    "act_max_steps",
    "act_epsilon",
    "act_loss_weight",
    "copy_halted",
    "force_halt_last",
)
ACTS = ("none", halting.ACCUMULATE, halting.CONVEX, halting.GLOBAL)
RULES = {
    "vocab_size": _SIZE,
    "n_step": _SIZE,
    "n_layer": _SIZE,
    "d_model": _SIZE,
    "n_head": _SIZE,
    "d_head": _LENGTH,
    "d_inner": _SIZE,
    "memory_length": _LENGTH,
    "context_length": Rule(FREE, least=1),
    "extended_length": _LENGTH,
    "window": _LENGTH,
    "positions": Rule(REFUSED, choices=("sinusoid", "learned", "relative", "none")),
    "table_length": _LENGTH,
    "step_signal": Rule(REFUSED, choices=("learned", "sinusoid", "none")),
    "transition": Rule(REFUSED, choices=("fc", "sepconv")),
    "act": Rule(REFUSED, choices=ACTS),
    "act_max_steps": _LENGTH,
    "act_epsilon": Rule(REFUSED, above=0, below=1),
    "act_loss_weight": Rule(TAKEN, least=0),
    "copy_halted": _PLAIN,
    "force_halt_last": _PLAIN,
    "causal": _PLAIN,
    "pre_norm": _PLAIN,
    "norm_epsilon": Rule(REFUSED, above=0),
    "dropout": Rule(TAKEN, least=0, below=1),
    "attention_dropout": Rule(TAKEN, least=0, below=1),
    "init_std": Rule(REFUSED, least=0),
    "dtype": Rule(TAKEN, choices=("auto", "float32", "bfloat16", "float64")),
    "scan_layers": Rule(FREE),
    "remat": Rule(FREE, choices=REMAT),
    "attention": Rule(FREE, choices=("auto", *IMPLEMENTATIONS)),
}


@dataclasses.dataclass(frozen=True)
class UniversalConfig:
    """Shapes and options of one Universal Transformer; tensor2tensor's in comments.

    The defaults are the sizes of its universal_transformer_base. Raises UserError for a
    wrong type or an impossible combination.
    """

    vocab_size: int | None = None  # token ids; None: the data decides
    n_step: int = 6  # num_rec_steps: how often the layers are applied, without ACT
    n_layer: int = 1  # num_inrecurrence_layers: distinct layers of a step
    d_model: int = 1024  # hidden_size
    n_head: int = 16
    d_head: int = 0  # 0: d_model / n_head
    d_inner: int = 4096  # filter_size
    memory_length: int = 0  # cached inputs of each layer of each step; 0: no state
    context_length: int = 512  # what generation sees where there is no memory
    extended_length: int = 0  # leading inputs without a target: `evaluate --stride`
    window: int | None = None  # largest visible distance
    positions: str = "sinusoid"  # added in each step; relative: Transformer-XL's
    table_length: int = 0  # rows of positions='learned'
    step_signal: str = "learned"  # step_timing_signal_type, added in each step
    transition: str = "fc"  # transformer_ffn_type
    act: str = "none"  # act_type: convex is its basic, accumulate its accumulated
    act_max_steps: int = 0  # 0: 2 * n_step
    act_epsilon: float = 0.01
    act_loss_weight: float = 0.01
    copy_halted: bool = False  # a halted state stays; the paper's text, not its program
    force_halt_last: bool = True  # weights sum to 1; not in tensor2tensor
    causal: bool = True
    pre_norm: bool = True  # tensor2tensor, with a final norm; False: the paper
    norm_epsilon: float = 1e-6
    dropout: float = 0.1  # layer_prepostprocess_dropout and relu_dropout
    attention_dropout: float = 0.0
    init_std: float = 0.0  # 0: d_model ** -0.5, as tensor2tensor's tables
    dtype: str = "auto"  # to compute in; parameters are float32
    scan_layers: bool = False  # one compiled step, looped; else unrolled
    remat: str = "none"  # recompute layers in backward: full, or all but attention
    attention: str = "auto"  # implementation of the attention operation

    RULES = RULES  # not annotated: no field

    @property
    def head_width(self) -> int:
        """d_head, derived from d_model if it is 0."""
        return self.d_head or self.d_model // self.n_head

    @property
    def encoding(self) -> int:
        """What is left to layers.attention of the positions."""
        return RELATIVE if self.positions == "relative" else SINUSOID

    @property
    def steps(self) -> int:
        """The most steps that are taken."""
        if self.act == "none":
            return self.n_step
        return self.act_max_steps or 2 * self.n_step

    @property
    def depth(self) -> int:
        """Layers that follow each other: n_layer of each step."""
        return self.steps * self.n_layer

    @property
    def context_widths(self) -> tuple[tuple[int, int], ...]:
        """(positions, channels) that each convolution of a layer carries."""
        if self.transition == "fc" or not self.memory_length:
            return ()
        widths = (self.d_model, self.d_inner)
        return tuple((w - 1, n) for w, n in zip(separable.WIDTHS, widths, strict=True))

    @property
    def absolute(self) -> bool:
        """Whether a token's place in its text is added to it."""
        return self.positions in ("sinusoid", "learned")

    @property
    def bins(self) -> Bins:
        """The shapes of the one table of embedding and softmax; needs vocab_size."""
        return Bins(self.vocab_size, self.d_model, self.d_model)

    @property
    def std(self) -> float:
        """init_std, derived from d_model if it is 0."""
        return self.init_std or self.d_model**-0.5

    def visibility(self, key_start_BT=None) -> Visibility:
        """What a token sees, from a segment's first visible keys on."""
        return Visibility(self.window, key_start_BT, self.causal)

    def tiny(self) -> UniversalConfig:
        """Returns a model with these options that a CPU trains in seconds: ':debug'."""
        sizes: dict[str, Any] = {
            "d_model": 16,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 32,
            "n_step": 2,
        }
        # Only where the model has it at all.
        optional = {"memory_length": 5, "window": 4, "table_length": 12}
        optional |= {"act_max_steps": 3, "extended_length": 3}
        sizes |= {name: n for name, n in optional.items() if getattr(self, name)}
        sizes |= {"n_layer": min(self.n_layer, 2), "context_length": 7}
        return dataclasses.replace(self, **sizes)

    def __post_init__(self):
        checks.fields(self)
        if not self.d_head and self.d_model % self.n_head:
            raise UserError(
                f"config.model.n_head={self.n_head} does not divide "
                f"config.model.d_model={self.d_model}; set d_head"
            )
        if self.d_model % 2 and self.positions == "relative":
            raise UserError(
                f"config.model.d_model={self.d_model} must be even: half sines, half "
                "cosines"
            )
        if (self.positions == "learned") != bool(self.table_length):
            raise UserError(
                f"config.model.positions={self.positions!r} with config.model."
                f"table_length={self.table_length}: the table is that of "
                "positions='learned', which needs at least segment_length rows"
            )
        self._check_act()
        if self.extended_length and self.memory_length:
            raise UserError(
                f"config.model.extended_length={self.extended_length} with "
                f"config.model.memory_length={self.memory_length}: what comes again is "
                "in the memory already; set one of them to 0"
            )
        if not self.causal and self.memory_length:
            raise UserError(
                f"config.model.causal=False with config.model.memory_length="
                f"{self.memory_length}: a memory is of what came before, for a model "
                "that does not look ahead; set memory_length=0"
            )

    def _check_act(self):
        shown = f"config.model.act={self.act!r}"
        if self.act == "none":
            for field in OF_ACT:
                value = getattr(self, field)
                if value != getattr(UniversalConfig, field):
                    raise UserError(
                        f"config.model.{field}={value} with {shown}: nothing halts"
                    )
            return
        # A token that has halted has no later states that others could remember, and
        # one that comes later may take more steps.
        if self.memory_length:
            raise UserError(
                f"{shown} with config.model.memory_length={self.memory_length}: memory "
                "per step with a changing depth; set memory_length=0"
            )
        if self.act == halting.GLOBAL and self.causal:
            raise UserError(
                f"{shown} with config.model.causal=True: the probability is averaged "
                "over all positions, later ones too; choose accumulate or convex, or "
                "causal=False"
            )
