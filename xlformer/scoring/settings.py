"""How a text is scored: the settings of an evaluation."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from xlformer.errors import Argument, UserError, did_you_mean
from xlformer.fields import VISIBLE
from xlformer.models import Model, checks

# How the text is cut. The section eval of a config has a default for each, and for what
# is VISIBLE.
OF_ROWS = ("segment_length", "batch_size")
NUMBERS = ("memory_length", "clamp_length", *OF_ROWS)
# Of dynamic evaluation: what is taken where nothing is said.
SGD = {"dynamic_rate": 0.1, "dynamic_decay": 0.0}
RMS = {
    "dynamic_rate": 1e-4,
    "dynamic_decay": 0.0,
    # With this rate it is sgd of 0.1 for what the looked-at text has no gradient of,
    # such as rare words: the published programs' is 0.12 to 0.2.
    "dynamic_epsilon": 1e-3,
    "dynamic_segments": 256,
}
DYNAMIC = {"sgd": SGD, "rms": RMS}


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """What is scored, of which checkpoint, and how; what is None is the run's own.

    Attributes:
      split: train, validation or test; None is validation.
      text: a file to score in place of a split.
      data_path: where the run's own text lies now, if it is neither prepared nor at
        config.data.path.
      checkpoint: best, latest, a step, or average:N (the mean of the last N).
      params: raw or ema; None is ema where the run keeps one.
      segment_length: tokens; None is that of config.eval, as for all that follow.
      memory_length: tokens that each layer sees; -1 is the model's.
      clamp_length: the largest distance that is told from larger ones; -1 is the
        model's.
      same_length: whether every token sees equally many.
      stride: of a window of segment_length tokens, which slides by so many: the last
        ones are scored, and what stands before them is read again. None or 0: segments
        follow each other.
      batch_size: rows that the text is cut into.
      warmup: auto, exact, fill or none; see rows.py.
      max_tokens: of the text's beginning; 0 is all.
      dynamic: sgd or rms: the parameters learn from each segment after it was scored;
        see dynamic.py. None: they stay as they are.
      dynamic_rate: how far they go.
      dynamic_decay: which share of the way back they go at each segment.
      dynamic_epsilon: of rms: what is added to the size of a gradient.
      dynamic_segments: of rms: at most how many of the training text tell that size.
    """

    split: str | None = None
    text: str | None = None
    data_path: str | None = None
    checkpoint: str | int = "best"
    params: str | None = None
    segment_length: int | None = None
    memory_length: int | None = None
    clamp_length: int | None = None
    same_length: bool | None = None
    stride: int | None = None
    batch_size: int | None = None
    warmup: str = "auto"
    max_tokens: int = 0
    dynamic: str | None = None
    dynamic_rate: float | None = None
    dynamic_decay: float | None = None
    dynamic_epsilon: float | None = None
    dynamic_segments: int | None = None

    def __post_init__(self):
        if self.text is not None and self.split is not None:
            raise UserError(
                Argument("text", self.text),
                " with ",
                Argument("split", self.split),
                ": a file of one's own has no splits",
            )
        for name in (*NUMBERS, "stride", "max_tokens", "dynamic_segments"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer | None):
                line = " is not a whole number"
                raise UserError(Argument(name, value), line)
        for name in ("memory_length", "clamp_length"):  # The others see rows.py.
            value = getattr(self, name)
            if value is not None and value < -1:
                line = " must not be negative (-1: the model's)"
                raise UserError(Argument(name, value), line)
        if self.stride is not None and self.stride < 0:
            line = " must not be negative (0: segments follow each other)"
            raise UserError(Argument("stride", self.stride), line)
        self._check_dynamic()

    def _check_dynamic(self):
        if self.dynamic is not None and self.dynamic not in DYNAMIC:
            line = f" is none of {', '.join(DYNAMIC)}"
            raise UserError(Argument("dynamic", self.dynamic), line)
        if self.dynamic and self.stride:
            line = ": what a window reads again would be learnt before it is scored"
            named = Argument("dynamic", self.dynamic), Argument("stride", self.stride)
            raise UserError(named[0], " with ", named[1], line)
        used = DYNAMIC.get(self.dynamic, {})
        for name in RMS:
            value = getattr(self, name)
            if value is None:
                continue
            if name not in used:
                how = Argument("dynamic", "rms" if name not in SGD else "sgd")
                raise UserError(Argument(name, value), " is nothing without ", how)
            _check_number(name, value, self.dynamic)

    def replaced(self, **fields) -> EvalSettings:
        """Returns settings with other values; UserError for an unknown name."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in fields:
            if name not in known:
                raise UserError(
                    f"evaluate has no setting {name!r}{did_you_mean(name, known)}"
                )
        return dataclasses.replace(self, **fields)

    def filled(self, defaults) -> EvalSettings:
        """Returns settings in which nothing about rows and visibility is left open.

        defaults: the section eval of a config.
        """
        found = {name: getattr(self, name) for name in (*VISIBLE, *OF_ROWS)}
        found = {k: defaults[k] if v is None else v for k, v in found.items()}
        # The section has no None: its False is the model's own.
        if self.same_length is None and not defaults.same_length:
            found["same_length"] = None
        if self.dynamic:
            found |= self._filled_dynamic(DYNAMIC[self.dynamic])
        return dataclasses.replace(self, **found)

    def _filled_dynamic(self, defaults: dict[str, float]) -> dict:
        # One row is what was published, and no other order of the text.
        rows = 1 if self.batch_size is None else self.batch_size
        found: dict = {"batch_size": rows}
        for name, value in defaults.items():
            given = getattr(self, name)
            found[name] = value if given is None else given
        if rows > 1:
            if self.warmup not in ("auto", "none"):
                raise UserError(
                    Argument("warmup", self.warmup),
                    " with ",
                    Argument("dynamic", self.dynamic),
                    " and ",
                    Argument("batch_size", rows),
                    ": what a row replays would be learnt before it is scored",
                )
            found["warmup"] = "none"
        return found

    def model(self, model: Model) -> Model:
        """Returns the model that reads with these settings; they are filled.

        Raises UserError for what it cannot be read with.
        """
        model = model.for_reading(**{name: getattr(self, name) for name in VISIBLE})
        window = self.segment_length or 0
        # A window has its own context in place of the model's.
        more = model.extended_length if self.stride else 0
        checks.segment(model, Argument("segment_length", window), window, more=more)
        return _sliding(model, window, self.stride) if self.stride else model

    @property
    def text_path(self) -> str | None:
        """Where the text to be scored lies now, as far as data_path is said of it."""
        # With another text, the training text alone is the run's own: see dynamic.py.
        of_training = self.text is not None and self.dynamic == "rms"
        return None if of_training else self.data_path

    @property
    def learning_rows(self) -> int:
        """Rows whose updates devices would have to share; 0 where nothing learns."""
        return (self.batch_size or 1) if self.dynamic else 0

    @property
    def scored_length(self) -> int:
        """How many tokens of a segment are scored; all, where no window slides."""
        return self.stride or self.segment_length or 0


def _check_number(name: str, value, dynamic: str) -> None:
    """Raises UserError for what no option of dynamic evaluation can be."""
    is_number = isinstance(value, int | float | np.number)
    if not is_number or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(Argument(name, value), " is no finite number")
    if name == "dynamic_segments" and value < 1:
        raise UserError(Argument(name, value), " must be at least 1")
    if name == "dynamic_epsilon" and value <= 0:
        raise UserError(Argument(name, value), " must be above 0")
    if value < 0:
        raise UserError(Argument(name, value), " must not be negative")
    if name == "dynamic_decay" and dynamic == "sgd" and value > 1:
        line = " must be at most 1: more goes beyond the trained parameters"
        raise UserError(Argument(name, value), line)


def _sliding(model: Model, window: int, stride: int) -> Model:
    """The model whose segments of `stride` tokens are led by the rest of the window."""
    named, who = Argument("stride", stride), type(model).__name__
    if stride > window:
        line = " is more than the window, "
        raise UserError(named, line, Argument("segment_length", window))
    if not model.causal:
        raise UserError(named, f": {who} looks ahead, and a window ends at its target")
    if model.memory_length != 0:
        raise UserError(
            named,
            f": {who} has a state, which carries what a window would read again; leave "
            "it out",
        )
    if stride < window and not model.resets_in_segment:
        line = f": {who} can be reset only before a segment (resets_in_segment=False), "
        raise UserError(named, line, "and the first windows begin before the text")
    if not hasattr(model.config, "extended_length"):
        line = f": {who} has no extended_length, the part that is read again"
        raise UserError(named, line)
    return model.for_reading(extended_length=window - stride)
