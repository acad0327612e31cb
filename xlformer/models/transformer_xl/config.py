"""The configuration of Transformer-XL: every field with its unit, checked at once."""

from __future__ import annotations

import dataclasses

from xlformer.errors import UserError
from xlformer.fields import FREE, REFUSED, TAKEN, Rule
from xlformer.kernels.relative_attention import IMPLEMENTATIONS
from xlformer.kernels.visibility import Visibility
from xlformer.layers.adaptive import Bins
from xlformer.layers.attention import (
    LEARNED_ABSOLUTE,
    LEARNED_RELATIVE,
    RELATIVE,
    ROTARY,
    SINUSOID,
)
from xlformer.layers.gating import GATES, NONE
from xlformer.layers.stack import REMAT
from xlformer.models import checks

_SIZE = Rule(REFUSED, least=1)
_LENGTH = Rule(REFUSED, least=0)  # tokens; 0: none, or derived
_PLAIN = Rule(REFUSED)
# Of each field: its range, and whether a run may change it. The memory of a checkpoint
# and its weights mean something only with the fields that are REFUSED.
RULES = {
    "vocab_size": _SIZE,
    "n_layer": _SIZE,
    "d_model": _SIZE,
    "n_head": _SIZE,
    "d_head": _LENGTH,
    "d_inner": _SIZE,
    "d_embed": _LENGTH,
    "memory_length": _LENGTH,
    "extended_length": _LENGTH,
    "attn_type": Rule(REFUSED, choices=(0, 1, 2, 3)),
    "positions": Rule(REFUSED, choices=("original", "rotary")),
    "pre_norm": _PLAIN,
    "norm_queries": _PLAIN,
    "final_norm": _PLAIN,
    "gate": Rule(REFUSED, choices=GATES),
    "untie_r": _PLAIN,
    "clamp_length": _LENGTH,
    "same_length": _PLAIN,
    "window": _LENGTH,
    "table_length": _LENGTH,
    "attend_zero_memory": _PLAIN,
    "allow_incoherent_positions": _PLAIN,
    "dropout": Rule(TAKEN, least=0, below=1),
    "attention_dropout": Rule(TAKEN, least=0, below=1),
    "cutoffs": _PLAIN,
    "div_val": _SIZE,
    "tie_weights": _PLAIN,
    "tie_projections": _PLAIN,
    "proj_same_dim": _PLAIN,
    "norm_epsilon": Rule(REFUSED, above=0),
    "init": Rule(REFUSED, choices=("normal", "uniform")),
    "init_std": Rule(REFUSED, least=0),
    "init_range": Rule(REFUSED, least=0),
    "proj_init_std": Rule(REFUSED, least=0),
    "init_scheme": Rule(REFUSED, choices=("pytorch", "tensorflow")),
    "dtype": Rule(TAKEN, choices=("auto", "float32", "bfloat16", "float64")),
    "scan_layers": Rule(FREE),
    "remat": Rule(FREE, choices=REMAT),
    "attention": Rule(FREE, choices=("auto", *IMPLEMENTATIONS)),
}


@dataclasses.dataclass(frozen=True)
class TransformerXLConfig:
    """Shapes and options of one Transformer-XL; the names of the original in comments.

    The defaults are the sizes of the original's enwik8_base, 41,055,436 parameters with
    204 symbols. Raises UserError for a wrong type or an impossible combination.
    """

    vocab_size: int | None = None  # token ids; None: the data decides
    n_layer: int = 12
    d_model: int = 512
    n_head: int = 8
    d_head: int = 0  # 0: d_model / n_head
    d_inner: int = 2048
    d_embed: int = 0  # 0: d_model
    memory_length: int = 512  # mem_len: cached positions of each layer
    extended_length: int = 0  # ext_len: leading inputs that are recomputed
    attn_type: int = 0  # 0 relative, 1 learned relative, 2 sinusoid, 3 learned
    positions: str = "original"  # those of attn_type; or rotary, not in the original
    pre_norm: bool = False  # pre_lnorm
    norm_queries: bool = True  # False: pre_lnorm of types 2 and 3; DI-engine's GTrXL
    final_norm: bool = False  # one more norm before the softmax; not in the original
    gate: str = "none"  # gru: GTrXL's for the residual sums, with norms as pre_norm
    untie_r: bool = False  # u and v of their own in each layer
    clamp_length: int = 0  # clamp_len: no distance is larger; 0: not clamped
    same_length: bool = False  # each query sees memory_length keys
    window: int | None = None  # largest visible distance; overrides same_length
    table_length: int = 0  # max_klen of types 1 and 3: segment + extended + memory
    attend_zero_memory: bool = False  # cold memory is zeros that are attended
    allow_incoherent_positions: bool = False  # types 2 and 3 with memory
    dropout: float = 0.1
    attention_dropout: float = 0.0  # dropatt
    cutoffs: tuple[int, ...] = ()  # first ids of the tail bins
    div_val: int = 1  # each bin's embeddings are narrower by this factor
    tie_weights: bool = True
    tie_projections: tuple[bool, ...] = ()  # tie_projs, one a bin; () ties none
    proj_same_dim: bool = True  # project even where the widths agree (div_val > 1)
    norm_epsilon: float = 1e-5  # of PyTorch; the TensorFlow original has 1e-12
    init: str = "normal"
    # The TensorFlow scripts for large WikiText-103 and lm1b models, which produced the
    # published figures, set 0.005; their PyTorch twins leave 0.02.
    init_std: float = 0.02
    init_range: float = 0.1  # of init='uniform'
    proj_init_std: float = 0.01
    init_scheme: str = "pytorch"  # or tensorflow: norms 1, clusters 0
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
    def encoding(self) -> int:
        """attn_type, or layers.attention.ROTARY."""
        return ROTARY if self.positions == "rotary" else self.attn_type

    @property
    def gated(self) -> bool:
        """Whether a gate, and a ReLU before it, stand for the residual sums."""
        return self.gate != NONE

    @property
    def norm_first(self) -> bool:
        """Whether a sub-layer's input is normalised, not what comes after it.

        A gate says so too: the residual path is never normalised there (identity-map
        reordering, Parisotto et al. 2019, section 3.1).
        """
        return self.pre_norm or self.gated

    @property
    def embedding_width(self) -> int:
        """d_embed, which defaults to d_model."""
        return self.d_embed or self.d_model

    @property
    def attention_window(self) -> int | None:
        """Largest visible distance: `window`, else what same_length implies.

        The PyTorch original and Hugging Face show memory_length keys, self included;
        the TensorFlow original one more (set window=memory_length for it).
        """
        # Distance 0 is the token itself, so the largest of M keys is M - 1.
        if self.window is None and self.same_length:
            return self.memory_length - 1
        return self.window

    def visibility(self, key_start_BT=None) -> Visibility:
        """What a token sees, from a segment's first visible keys on."""
        return Visibility(self.attention_window, key_start_BT)

    @property
    def bins(self) -> Bins:
        """The shapes of the tables of embedding and softmax; needs vocab_size."""
        return Bins(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            d_embed=self.embedding_width,
            cutoffs=self.cutoffs,
            div_val=self.div_val,
            proj_same_dim=self.proj_same_dim,
        )

    def tiny(self) -> TransformerXLConfig:
        """Returns a model with these options that a CPU trains in seconds: ':debug'.

        Every size is set here, so that models of one family have equal shapes. Sizes
        are primes where they may be: mixed-up axes then show.
        """
        sizes = {"n_layer": 2, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32}
        # Only where the model has it at all; 12 is segment and memory.
        optional = {"memory_length": 5, "extended_length": 3, "clamp_length": 3}
        optional |= {"window": 4, "table_length": 12, "d_embed": 16}
        sizes |= {name: n for name, n in optional.items() if getattr(self, name)}
        if self.cutoffs:
            sizes["cutoffs"] = (11, 19)
            sizes["div_val"] = min(self.div_val, 2)
            sizes["tie_projections"] = self.tie_projections[:3]
        return dataclasses.replace(self, **sizes)

    def __post_init__(self):
        checks.fields(self)
        self._check_attention()
        self._check_bins()

    def _check_attention(self):
        if self.encoding == ROTARY:
            self._check_rotary()
        width = self.n_head * self.head_width
        if not self.d_head and self.d_model % self.n_head:
            raise UserError(
                f"config.model.n_head={self.n_head} does not divide "
                f"config.model.d_model={self.d_model}; set d_head"
            )
        if self.d_model % 2 and self.encoding in (RELATIVE, SINUSOID):
            raise UserError(
                f"config.model.d_model={self.d_model} must be even: half sines, half "
                "cosines"
            )
        if self.attn_type == LEARNED_ABSOLUTE and width != self.d_model:
            raise UserError(
                f"config.model.attn_type=3 needs n_head * d_head = d_model, found "
                f"{width} and {self.d_model}"
            )
        if (
            self.attn_type in (LEARNED_RELATIVE, LEARNED_ABSOLUTE)
            and not self.table_length
        ):
            raise UserError(
                f"config.model.table_length=0 with attn_type={self.attn_type}: set it "
                "to segment_length + extended_length + memory_length"
            )
        if not self.norm_queries and not self.norm_first:
            raise UserError(
                "config.model.norm_queries=False with pre_norm=False: there is no norm "
                "before attention"
            )
        # The original adds the position vectors in place to the memory, where they pile
        # up segment after segment; its paper uses these types without memory only.
        incoherent = (
            self.attn_type in (SINUSOID, LEARNED_ABSOLUTE) and self.memory_length
        )
        if incoherent and not self.allow_incoherent_positions:
            raise UserError(
                f"config.model.memory_length={self.memory_length} with "
                f"attn_type={self.attn_type}: absolute positions of memory and segment "
                "collide; set memory_length=0, or allow_incoherent_positions=True"
            )
        window = self.attention_window
        if window is not None and window < 0:
            raise UserError(
                f"config.model.same_length with memory_length={self.memory_length} "
                f"shows distances up to {window}: a token must see itself"
            )

    def _check_rotary(self):
        for field in ("attn_type", "clamp_length"):
            value = getattr(self, field)
            if value:
                raise UserError(
                    f"config.model.positions='rotary' with config.model.{field}="
                    f"{value}: rotary positions replace those of attn_type=0 and "
                    "cannot be clamped; set it to 0"
                )
        if self.head_width % 2:
            raise UserError(
                f"config.model.positions='rotary' turns pairs, but d_head="
                f"{self.head_width} is odd"
            )

    def _check_bins(self):
        checks.cutoffs(self)
        bins = 1 + len(self.cutoffs)
        if self.tie_projections and len(self.tie_projections) != bins:
            raise UserError(
                f"config.model.tie_projections={self.tie_projections} has "
                f"{len(self.tie_projections)} entries for {bins} bins"
            )
        if self.embedding_width // self.div_val ** (bins - 1) < 1:
            raise UserError(
                f"config.model.div_val={self.div_val} leaves no width in bin "
                f"{bins - 1}: d_embed={self.embedding_width}"
            )
