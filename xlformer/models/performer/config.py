"""The configuration of the Performer: every field, checked at once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from xlformer.errors import UserError
from xlformer.fields import FREE, REFUSED, TAKEN, Rule
from xlformer.kernels.features import FEATURES
from xlformer.kernels.relative_attention import IMPLEMENTATIONS
from xlformer.layers.adaptive import Bins
from xlformer.layers.stack import REMAT
from xlformer.models import checks

_SIZE = Rule(REFUSED, least=1)
_LENGTH = Rule(REFUSED, least=0)
_PLAIN = Rule(REFUSED)
_RATE = Rule(TAKEN, least=0, below=1)
FAVOR, SOFTMAX, LSH, LINFORMER, IDENTITY = MECHANISMS = (
    "favor",
    "softmax",
    "lsh",
    "linformer",
    "identity",
)
# What only some mechanisms read: set for another one, it is a mistake.
ONLY_OF = {
    "carry_sums": (FAVOR,),
    "features": (FAVOR,),
    "n_features": (FAVOR,),
    "projected": (FAVOR,),
    "orthogonal": (FAVOR,),
    "redraw_interval": (FAVOR,),
    "feature_seed": (FAVOR, LSH),
    "feature_epsilon": (FAVOR,),
    "stabiliser": (FAVOR,),
    "maxima": (FAVOR,),
    "renormaliser": (FAVOR,),
    "rounds": (LSH,),
    "buckets": (LSH,),
    "chunk": (LSH,),
    "scaling": (LSH,),
    "same_bucket_only": (LSH,),
    "discount_duplicates": (LSH,),
    "projection_length": (LINFORMER,),
    "share_kv": (LINFORMER,),
    "attention_dropout": (SOFTMAX,),
    "attention": (SOFTMAX,),
}
# What only the published forms of the estimator have, and only random projections.
OF_ORIGINAL = ("maxima", "renormaliser")
OF_PROJECTION = ("n_features", "orthogonal", "redraw_interval", "feature_seed")
RULES = {
    "vocab_size": _SIZE,
    "n_layer": _SIZE,
    "d_model": _SIZE,
    "n_head": _SIZE,
    "d_head": _LENGTH,
    "d_inner": _SIZE,
    "mechanism": Rule(REFUSED, choices=MECHANISMS),
    "positions": Rule(REFUSED, choices=("rotary", "learned")),
    "context_length": _SIZE,
    "extended_length": _LENGTH,
    "causal": _PLAIN,
    "carry_sums": _PLAIN,
    "features": Rule(REFUSED, choices=tuple(FEATURES)),
    "n_features": _LENGTH,
    "projected": _PLAIN,
    "orthogonal": _PLAIN,
    # Another interval counts from here on: rows begin anew where their draw changes.
    "redraw_interval": Rule(TAKEN, least=0),
    "feature_seed": _LENGTH,
    "feature_epsilon": Rule(REFUSED, least=0),
    "stabiliser": Rule(REFUSED, choices=("running", "original")),
    "maxima": Rule(TAKEN, choices=("differentiated", "constant")),
    "renormaliser": Rule(REFUSED, least=0),
    "rounds": _SIZE,
    "buckets": Rule(REFUSED, least=2),
    "chunk": _SIZE,
    "scaling": Rule(REFUSED, choices=("unit", "unit_scaled")),
    "same_bucket_only": _PLAIN,
    "discount_duplicates": _PLAIN,
    "projection_length": _SIZE,
    "share_kv": _PLAIN,
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
class PerformerConfig:
    """Shapes and options of one Performer, and of what it is compared with.

    The defaults are the sizes of the paper's base model. Raises UserError for a wrong
    type or an impossible combination.
    """

    vocab_size: int | None = None  # token ids; None: the data decides
    n_layer: int = 6
    d_model: int = 512
    n_head: int = 8
    d_head: int = 0  # 0: d_model / n_head
    d_inner: int = 2048
    mechanism: str = FAVOR  # softmax, lsh, linformer, identity: the same parameters
    positions: str = "rotary"  # or learned: a row of a table is added to the input
    context_length: int = 1024  # rows of that table; Linformer's longest input; window
    extended_length: int = 0  # leading inputs without a target: `evaluate --stride`
    causal: bool = True
    # FAVOR
    carry_sums: bool = True  # into the next segment, where positions are rotary
    features: str = "positive"  # or another map of kernels/features.py
    n_features: int = 0  # rows of the projection; 0: K ln K of heads of width K
    projected: bool = True  # False: features of a kernel are those of q and k itself
    orthogonal: bool = True
    redraw_interval: int = 1000  # steps that share a projection; 0: one for all
    feature_seed: int = 0  # of the projections, and of the hashes of lsh
    feature_epsilon: float | None = None  # added to features; None: see `epsilon`
    stabiliser: str = "running"  # strictly causal; original: as published, it leaks
    maxima: str = "differentiated"  # as Google's; constant: as lucidrains'
    renormaliser: float | None = None  # published: keeps denominators off 0
    # Reformer's attention
    rounds: int = 4  # of hashing
    buckets: int = 32
    chunk: int = 64  # tokens that see themselves and the chunk before
    scaling: str = "unit"  # of keys: trax, Hugging Face; unit_scaled: reformer-pytorch
    same_bucket_only: bool = False  # reformer-pytorch's option
    discount_duplicates: bool = False  # of pairs that meet in several rounds, likewise
    # Linformer's attention
    projection_length: int = 256  # what the length of the input is projected to
    share_kv: bool = False  # values are the keys: lucidrains' option
    # all
    dropout: float = 0.1
    attention_dropout: float = 0.0
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    dtype: str = "auto"  # to compute in; parameters are float32
    scan_layers: bool = False  # one compiled layer, looped; else unrolled
    remat: str = "none"  # recompute layers in backward: full, or all but attention
    attention: str = "auto"  # implementation of softmax attention

    RULES = RULES  # not annotated: no field

    @property
    def head_width(self) -> int:
        """d_head, derived from d_model if it is 0."""
        return self.d_head or self.d_model // self.n_head

    @property
    def projection_rows(self) -> int:
        """n_features, derived from the width of a head if it is 0."""
        K = self.head_width
        return self.n_features or max(1, int(K * math.log(K)))

    @property
    def feature_width(self) -> int:
        """Features of a query or a key."""
        if not self.projected:
            return self.head_width
        return FEATURES[self.features].width * self.projection_rows

    @property
    def interval(self) -> int:
        """redraw_interval, 0 where nothing is drawn."""
        return self.redraw_interval if self.projected else 0

    @property
    def estimates(self) -> bool:
        """Whether features are those of exp(q.k), and not of a kernel of their own."""
        return FEATURES[self.features].softmax

    @property
    def epsilon(self) -> float:
        """feature_epsilon; by default none for what estimates exp(q.k), where it would
        be a bias, but Google's 1e-6 in the published forms, and 1e-3 for all others,
        whose features may all be 0.
        """
        if self.feature_epsilon is not None:
            return self.feature_epsilon
        if not self.estimates:
            return 1e-3
        return 0.0 if self.stabiliser == "running" else 1e-6

    @property
    def delta(self) -> float:
        """renormaliser; by default Google's."""
        if self.renormaliser is not None:
            return self.renormaliser
        return self.epsilon if self.estimates else 0.0

    @property
    def carries(self) -> bool:
        """Whether sums over all that came before are carried from call to call.

        Learned positions begin anew in every segment, and the published forms know no
        maximum of what was before.
        """
        return (
            self.mechanism == FAVOR
            and self.carry_sums
            and self.causal
            and self.positions == "rotary"
            and self.stabiliser == "running"
        )

    @property
    def caches(self) -> bool:
        """Whether projections are drawn that reading may keep beside the state."""
        return self.carries and self.projected

    @property
    def resets_inside(self) -> bool:
        """Whether a reset may lie inside a segment.

        Not where a token sees later ones, and not with lsh: a fresh row would cut its
        sorted tokens at other places.
        """
        return self.causal and self.mechanism != LSH

    @property
    def bounded(self) -> bool:
        """Whether no segment may be longer than context_length."""
        return self.positions == "learned" or self.mechanism == LINFORMER

    @property
    def bins(self) -> Bins:
        """The shapes of the one table of embedding and softmax; needs vocab_size."""
        return Bins(self.vocab_size, self.d_model, self.d_model)

    def tiny(self) -> PerformerConfig:
        """Returns a model with these options that a CPU trains in seconds: ':debug'."""
        sizes: dict[str, Any] = {
            "n_layer": 2,
            "d_model": 16,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 32,
            "context_length": 11,
        }
        # Only where they are read, and where the model has it at all.
        sizes |= {
            LSH: {"rounds": 2, "buckets": 4, "chunk": 3},
            LINFORMER: {"projection_length": 5},
        }.get(self.mechanism, {})
        optional = {"n_features": 11, "redraw_interval": 2, "extended_length": 3}
        if not (self.mechanism == FAVOR and self.projected):
            optional.pop("redraw_interval")
        sizes |= {name: n for name, n in optional.items() if getattr(self, name)}
        return dataclasses.replace(self, **sizes)

    def __post_init__(self):
        checks.fields(self)
        if not self.d_head and self.d_model % self.n_head:
            raise UserError(
                f"config.model.n_head={self.n_head} does not divide "
                f"config.model.d_model={self.d_model}; set d_head"
            )
        if self.positions == "rotary" and self.head_width % 2:
            raise UserError(
                f"config.model.positions='rotary' with heads of width "
                f"{self.head_width}: they are turned in pairs; set d_head"
            )
        for field, readers in ONLY_OF.items():
            self._check_read(field, self.mechanism in readers, "mechanism")
        for field in OF_ORIGINAL:
            self._check_read(field, self.stabiliser != "running", "stabiliser")
        for field in OF_PROJECTION:
            self._check_read(field, self.projected, "projected")
        # The greatest exponents are of those that estimate exp(q.k).
        self._check_read("maxima", self.estimates, "features")
        self._check_features()
        self._check_lengths()

    def _check_read(self, field: str, read: bool, decides: str) -> None:
        value, default = getattr(self, field), getattr(PerformerConfig, field)
        if not read and value != default:
            raise UserError(
                f"config.model.{field}={value} with config.model.{decides}="
                f"{getattr(self, decides)!r}, which does not read it: leave it "
                f"{default}"
            )

    def _check_features(self):
        shown = f"config.model.features={self.features!r}"
        # Trigonometric ones cancel too, but they estimate what is positive.
        divides = FEATURES[self.features].nonnegative or self.estimates
        if not divides and self.stabiliser == "running":
            fine = [n for n, f in FEATURES.items() if f.nonnegative or f.softmax]
            raise UserError(
                f"{shown} can be negative, so that a denominator may be 0: choose one "
                f"of {', '.join(fine)}; stabiliser='original' has it as published"
            )
        if not self.projected and self.estimates:
            raise UserError(
                f"config.model.projected=False with {shown}, which estimates exp(q.k) "
                "by random projections"
            )
        if self.stabiliser != "running" and self.features == "hyperbolic":
            raise UserError(
                f"{shown} with config.model.stabiliser={self.stabiliser!r}: no program "
                "has published them"
            )
        if self.buckets % 2:
            raise UserError(
                f"config.model.buckets={self.buckets} must be even: vectors and their "
                "opposites are hashed alike"
            )
        if self.discount_duplicates and not self.same_bucket_only:
            raise UserError(
                "config.model.discount_duplicates=True with config.model."
                "same_bucket_only=False: pairs of different rounds would count 1e9 "
                "times; set both"
            )

    def _check_lengths(self):
        if self.mechanism == LINFORMER and self.causal:
            raise UserError(
                "config.model.mechanism='linformer' with config.model.causal=True: it "
                "projects the whole length, later tokens too; set causal=False (and "
                "config.train.objective='masked')"
            )
        if self.extended_length and self.carries:
            raise UserError(
                f"config.model.extended_length={self.extended_length} with config."
                "model.mechanism='favor', whose sums have it already; set it to 0"
            )
        if self.extended_length and not self.resets_inside:
            why = f"mechanism={self.mechanism!r}" if self.causal else "causal=False"
            raise UserError(
                f"config.model.extended_length={self.extended_length} with config."
                f"model.{why}: what comes before a text could not be hidden within a "
                "segment; set it to 0"
            )
        if self.bounded and self.extended_length >= self.context_length:
            raise UserError(
                f"config.model.extended_length={self.extended_length} must be below "
                f"config.model.context_length={self.context_length}: no target is left"
            )
