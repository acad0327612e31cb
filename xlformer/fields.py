"""The table of every option: its default, its range, and what a resumed run does.

`config.default_config` is made of it, `config.check` holds a config to it, and
`runs.resume` compares the config of a run with the one that its checkpoint was sealed
with. The options of `config.model` are the fields of the model's own dataclass, whose
RULES have the same form.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from xlformer.errors import Argument, UserError, did_you_mean

# What becomes of a resumed run whose value of an option has changed.
REFUSED = "refused"  # The checkpoint would mean something else, or would not fit.
TAKEN = "taken"  # It counts from here on, and the run says what changes.
FREE = "free"  # The numbers of the run do not depend on it.
# Steps, rows and positions are int32 on the device: JAX has no more by default.
LARGEST = (1 << 31) - 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value may be, and what becomes of a run whose value has changed.

    Attributes:
      resume: REFUSED, TAKEN or FREE.
      least, most: the smallest and the largest value.
      above, below: the same, themselves not included.
      choices: all values there are.
      off: a value beside the range that switches the option off.
      switch: zero and not zero are refused for each other, because they are other
        arrays of the training state.
    """

    resume: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple = ()
    off: Any = None
    switch: bool = False

    def check(self, name: str, value) -> None:
        """Raises UserError where `value` is out of range, or no finite number."""
        if self.choices:
            if value not in self.choices:
                near = did_you_mean(str(value), map(str, self.choices))
                # Else it lists what is known, which the line has already.
                near = near if "did you mean" in near else ""
                shown = ", ".join(map(str, self.choices))
                raise UserError(f"{name}={value!r} is none of {shown}{near}")
            return
        # bool is an int in Python, and has no range.
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}={value} must be a finite number")
        if self.off is not None and value == self.off:
            return
        bounds = (
            (self.least, "at least", lambda bound: value >= bound),
            (self.above, "above", lambda bound: value > bound),
            (self._most(value), "at most", lambda bound: value <= bound),
            (self.below, "below", lambda bound: value < bound),
        )
        given = [bound for bound in bounds if bound[0] is not None]
        if not all(holds(limit) for limit, _, holds in given):
            said = " and ".join(f"{words} {limit}" for limit, words, _ in given)
            also = f" (or {self.off})" if self.off is not None else ""
            raise UserError(f"{name}={value} must be {said}{also}")

    def _most(self, value):
        return LARGEST if self.most is None and isinstance(value, int) else self.most


@dataclasses.dataclass(frozen=True)
class Field:
    """An option of a config: its default, whose type is the option's, and its rule."""

    default: Any
    rule: Rule


def _field(default, resume: str, **rule) -> Field:
    return Field(default, Rule(resume, **rule))


# A decay of 0 keeps nothing of what was, one of 1 would keep all and learn nothing.
_RATIO = {"least": 0, "below": 1}
SPLITS = ("train", "validation", "test")


class Objective(NamedTuple):
    """What a model may be trained to say; training/objectives.py says it.

    Attributes:
      causal: of the models that it is for.
      symbols: how many it needs after those of the data, such as a mask.
    """

    causal: bool
    symbols: int = 0


OBJECTIVES = {"next_token": Objective(True), "masked": Objective(False, symbols=1)}

# config.own_model of a run that an earlier release sealed, which did not say it.
UNSAID = "?"
SCHEDULES = (
    "cosine",
    "cosine_after_warmup",
    "inverse_sqrt",
    "constant",
    "plateau",
    "steps",
)
OPTIMIZERS = (
    "adam",
    "adamw",
    "lamb",
    "lamb_sha_rnn",
    "sgd",
    "nt_asgd",
    "muon",
    "adafactor",
)

# Section -> name -> what it may be. '' is the top of the tree.
TABLE: Mapping[str, Mapping[str, Field]] = {
    "": {
        "name": _field("", FREE),
        # JAX's keys have 32 bits of it: seeds 2^32 apart draw the same parameters.
        "seed": _field(1111, REFUSED, least=-(1 << 63), most=(1 << 63) - 1),
        # The work directory whose weights a new run starts from.
        "init_from": _field("", FREE),
        # The class of the model that train(..., model=) was given; '' is config.model.
        "own_model": _field("", REFUSED),
    },
    "data": {
        # A name of data/sources.py, 'stdlib', or 'text' for the files of `path`.
        "corpus": _field("stdlib", REFUSED),
        # Your own text: files or globs, separated by ';', and what its symbols are.
        "path": _field("", FREE),
        "unit": _field("bytes", REFUSED, choices=("bytes", "chars", "words")),
        # Own words that were seen fewer times are <unk>: 0 stands for 2, 1 keeps all.
        # max_vocab counts symbols, <unk> among them; 0 sets no bound. Both are free,
        # because the vocabulary that comes of them is compared.
        "min_count": _field(0, FREE, least=0),
        "max_vocab": _field(0, FREE, least=3, off=0),
        # Whether memory is reset where a file begins.
        "documents": _field(False, REFUSED),
        # A file of SentencePiece or of Hugging Face's tokenizers; sentencepiece:N and
        # tokenizers:N train one of N pieces on train.
        "tokenizer": _field("", FREE),
        # The words that are symbols, a line each: of lm1b, whose own have such a file.
        "vocab_file": _field("", FREE),
        # Of enwik8: the original's own preparation drops byte 10.
        "newline": _field("keep", REFUSED, choices=("keep", "drop")),
        # Of enwik8 and text8: the symbols that occur, or all 256 values of a byte.
        "alphabet": _field("counted", REFUSED, choices=("counted", "bytes")),
        # Where prepared corpora lie; '' is $XLFORMER_DATA, or ~/.cache/xlformer.
        "directory": _field("", FREE),
        # Where archives lie that you have fetched yourself.
        "manual_dir": _field("", FREE),
    },
    "train": {
        # Optimizer steps, rows over all devices, and tokens of a row in one step.
        "steps": _field(1000, TAKEN, least=1),
        "batch_size": _field(16, REFUSED, least=1),
        "segment_length": _field(64, REFUSED, least=1),
        # Gradients of so many groups of rows are added: less memory, the same step.
        "micro_batches": _field(1, FREE, least=1),
        # Steps in one compiled call: less of the host, the same numbers.
        "segments_per_call": _field(1, FREE, least=1),
        # The original's --varlen; see data/stream.py.
        "variable_length": _field(False, REFUSED),
        "objective": _field("next_token", REFUSED, choices=tuple(OBJECTIVES)),
        # Of the symbols, how many are hidden. Losses of other rates do not compare.
        "mask_rate": _field(0.15, REFUSED, above=0, most=1),
        # Only the later half of each segment is scored, as in the paper's ablation.
        "half_loss": _field(False, TAKEN),
        # A step whose loss is not finite is dropped.
        "skip_nonfinite": _field(False, TAKEN),
        # A loss so many times its average makes the run go back and leave out that
        # segment; a factor of 1 or less would leave out every other one. 0 is off, and
        # nothing is a spike in the first spike_after steps.
        "spike_factor": _field(0.0, TAKEN, above=1, off=0),
        "spike_after": _field(100, TAKEN, least=0),
        # Of the average of the parameters, free of the initial ones: after the first
        # step it is that step's. 0 keeps none.
        "ema_decay": _field(0.0, TAKEN, switch=True, **_RATIO),
        # The last share of the steps, of whose parameters the mean is kept in the place
        # of that average (tail averaging); 0 keeps none.
        "tail_average": _field(0.0, TAKEN, switch=True, least=0, most=1),
        # Every so many steps; 0 validates and saves only at the end.
        "log_every": _field(100, FREE, least=0),
        "eval_every": _field(1000, TAKEN, least=0),
        "save_every": _field(1000, FREE, least=0),
        # The latest checkpoints, and the best one beside them.
        "keep": _field(2, FREE, least=1),
        # The first step of a profiler trace, and how many it covers; 0 takes none.
        "profile_start": _field(0, FREE, least=0),
        "profile_steps": _field(0, FREE, least=0),
    },
    "optimizer": {
        "name": _field("adam", REFUSED, choices=OPTIMIZERS),
        "learning_rate": _field(2.5e-4, TAKEN, least=0),
        "schedule": _field("cosine", TAKEN, choices=SCHEDULES),
        "warmup_steps": _field(0, TAKEN, least=0),
        # What the first step counts as in a warm-up: with 0 its rate is 0, as in the
        # TensorFlow original, with 1 a first part of the whole (SHA-RNN).
        "warmup_from": _field(0, TAKEN, choices=(0, 1)),
        # Where in the run, as shares of train.steps, 'steps' multiplies the rate by
        # decay_factor.
        "decay_at": _field((), TAKEN),
        "decay_factor": _field(0.1, TAKEN, above=0, most=1),
        # Whether the rate of a segment is times its length / segment_length, where
        # lengths vary.
        "length_scaled": _field(False, TAKEN),
        # Of the learning rate, where a cosine ends.
        "final_fraction": _field(0.0, TAKEN, least=0, most=1),
        # Of all gradients together; 0 does not clip.
        "clip_norm": _field(0.25, TAKEN, least=0, switch=True),
        "b1": _field(0.9, TAKEN, **_RATIO),
        "b2": _field(0.999, TAKEN, **_RATIO),
        "epsilon": _field(1e-8, TAKEN, least=0),
        # Which optimizers read these four says ONLY_OF. Biases do not decay; but in sgd
        # and nt_asgd, as a part of the gradient (torch), and in lamb_sha_rnn all do.
        "weight_decay": _field(0.0, TAKEN, least=0),
        "momentum": _field(0.0, TAKEN, switch=True, **_RATIO),
        # The least trust ratio of lamb_sha_rnn; 0 sets no floor.
        "min_trust": _field(0.25, TAKEN, least=0),
        # nt_asgd averages from the first validation on whose loss exceeds the least of
        # all but so many before it (Merity et al. 2018): an array of that length.
        "nonmonotone": _field(5, REFUSED, least=1, most=1000),
        # The rate is multiplied by plateau_factor when more than plateau_patience
        # validations in a row have brought no lower loss.
        "plateau_factor": _field(0.5, TAKEN, above=0, most=1),
        "plateau_patience": _field(0, TAKEN, least=0),
    },
    # The axes of the mesh, the outermost first; sharding.RULES says what each splits.
    "mesh": {
        # Copies of the model; -1 is as many as devices and rows allow.
        "data": _field(-1, FREE, least=1, off=-1),
        # Devices that share one copy; those that share its heads and widths.
        "fsdp": _field(1, FREE, least=1, off=-1),
        "tensor": _field(1, FREE, least=1, off=-1),
    },
    # Limits in seconds: until all hosts have joined, until a silent one is missing, and
    # the same while it compiles, restores or agrees.
    "hosts": {
        "start_limit": _field(300.0, FREE, least=1),
        "heartbeat": _field(100.0, FREE, least=1),
        "phase_limit": _field(3600.0, FREE, least=1),
    },
    # What 'best' compares (runs/checkpoints.py): losses of equal settings only. Lengths
    # of -1 are the model's own. max_tokens is of the validations in training; 0 is all.
    "eval": {
        "split": _field("validation", TAKEN, choices=SPLITS),
        "batch_size": _field(8, TAKEN, least=1),
        "segment_length": _field(64, TAKEN, least=1),
        "memory_length": _field(-1, TAKEN, least=-1),
        "clamp_length": _field(-1, TAKEN, least=-1),
        "same_length": _field(False, TAKEN),
        "max_tokens": _field(0, TAKEN, least=0),
    },
}
# Of the section eval, what a model is read with in place of its own values
# (Model.for_reading). -1, and False, leave the model its own.
VISIBLE = ("memory_length", "clamp_length", "same_length")
# Options of the optimizer that only some read: set for another one they are a mistake.
ONLY_OF = {
    "weight_decay": (
        "adamw",
        "lamb",
        "lamb_sha_rnn",
        "sgd",
        "nt_asgd",
        "muon",
        "adafactor",
    ),
    "momentum": ("sgd",),
    "min_trust": ("lamb_sha_rnn",),
    "nonmonotone": ("nt_asgd",),
}


def check_section(section: str, values: Mapping) -> None:
    """Raises UserError for a value of another type than its default's, or out of range.

    section: a key of TABLE; values: what a config has of it.
    """
    for name, field in TABLE[section].items():
        shown, value = ".".join(filter(None, ("config", section, name))), values[name]
        kind = type(field.default)
        # An int will do for a float: a config file may say learning_rate = 1.
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise UserError(f"{shown}={value!r:.50} is not of type {kind.__name__}")
        field.rule.check(shown, value)


def parse(text: str, like, *named: str | Argument) -> Any:
    """What a person typed, as a value of the type of `like`; of any type if it is None.

    `named`, which has the text in it, begins the line of the UserError.
    """
    if isinstance(like, str):
        return text
    try:
        # Literals only: what a person typed is not run.
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # As people write them in other programs.
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    # 3 is a fine learning rate; 3.5 is no number of layers.
    if isinstance(like, float) and type(value) is int:
        value = float(value)
    if isinstance(like, tuple) and isinstance(value, list):
        value = tuple(value)
    # By exact type, because True would pass for the number 1.
    if like is not None and type(value) is not type(like):
        expected = f": expected {type(like).__name__}, as in {like!r}"
        raise UserError(*named, expected)
    return value


def parse_pairs(text: str, defaults: Mapping, named: Argument) -> dict:
    """'a=8,b' as {'a': 8, 'b': True}, of the types of the defaults."""
    values = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if key not in defaults:
            near = did_you_mean(key, defaults)
            raise UserError(named, f": unknown argument {key!r}{near}")
        if not equals and not isinstance(defaults[key], bool | None):
            raise UserError(named, f": {key!r} needs a value: {key}=VALUE")
        value = value if equals else "True"
        values[key] = parse(value, defaults[key], named, f" argument {key!r}={value}")
    return values
