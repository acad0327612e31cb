"""What a report is about: the runs, how much of their text is read, where files go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from xlformer import models
from xlformer.errors import UserError
from xlformer.instruments.members import Member
from xlformer.reporting.charts import Line, Panel
from xlformer.reporting.page import Figure, Text, clean, shown
from xlformer.scoring import results

# Of `python -m xlformer.report`, as lines of the page name them.
FLAGS = ("workdir", "checkpoint", "data_path", "split", "tokens", "samples")
NAMES_IN_TEXT = 40  # characters of a run's name


@dataclasses.dataclass
class Subject:
    """What a report is about.

    Attributes:
      members: the runs, under names of which each is another.
      out: the folder of the PNGs.
      split: what is scored and continued; None is validation.
      tokens: how many are scored.
      samples: how many continuations of each run are shown.
      context, length: tokens of a continuation's prompt, and of itself.
      seed: of the samples.
      say: is told what takes its time now.
      drawn: the names of all pictures.
    """

    members: Sequence[Member]
    out: epath.Path
    split: str | None = None
    tokens: int = 32_768
    samples: int = 1
    context: int = 64
    length: int = 256
    seed: int = 0
    say: Callable[[str], None] = lambda line: None
    drawn: set = dataclasses.field(default_factory=set)
    _texts: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        names = [clean(member.name)[:NAMES_IN_TEXT] for member in self.members]
        if len(set(names)) < len(names):
            names = [f"{i} {name}" for i, name in enumerate(names, 1)]
        self.members = [
            dataclasses.replace(member, name=name)
            for member, name in zip(self.members, names, strict=True)
        ]

    def text(self, member: Member):
        """(tokens, documents, facts) of the split; UserError where there is none."""
        if member.name not in self._texts:
            try:
                found = member.text(self.split or "validation")
            except UserError as error:
                found = error
            self._texts[member.name] = found
        found = self._texts[member.name]
        if isinstance(found, UserError):
            raise found
        return found

    def draw(self, panels: Sequence[Panel], caption: Any) -> list[Figure]:
        """The panels that have points, as one figure; [] where none has."""
        panels = [p for p in panels if any(len(x.x) for x in p.lines)]
        self.drawn |= {panel.name for panel in panels}
        drawn = [panel.draw(self.out) for panel in panels]
        return [Figure(caption, drawn)] if drawn else []


def of_each(subject: Subject, measure: Callable[[Member], Any]):
    """({name: what was found}, [Text of a run of which that cannot be said])."""
    found, missing = {}, []
    for member in subject.members:
        try:
            found[member.name] = measure(member)
        except UserError as error:
            line = clean(error.line(FLAGS))
            missing.append(Text(f"{member.name}: {line}", "missing"))
        except jax.errors.JaxRuntimeError as error:
            line = clean(error)[:200]
            missing.append(Text(f"{member.name}: {line}", "missing"))
    return found, missing


def _perplexity(nats):
    # Beyond 700 it is no float64; such a loss is not drawn.
    return np.exp(np.minimum(nats, 700.0))


@dataclasses.dataclass(frozen=True)
class Scale:
    """In what all runs can be drawn together.

    Attributes:
      label: of the axis.
      of: nats per token to it.
      is_power: whether the axis should be one of powers.
    """

    label: str
    of: Callable[[Any], Any]
    is_power: bool = False

    @classmethod
    def common(cls, members: Sequence[Member]) -> Scale:
        """Bits or perplexity where all have one unit, else nats per token."""
        units = {member.run.vocabulary.unit for member in members}
        if len(units) > 1:
            return cls("nats per token", lambda nats: nats)
        (unit,) = units
        if results.headline(0.0, unit)[0] == "ppl":
            return cls(f"perplexity of {unit}", _perplexity, True)
        one = {"bytes": "byte", "chars": "character"}.get(unit, "token")
        return cls(f"bits per {one}", results.bits)


def memory(model: models.Model) -> int | None:
    """The length of a model's memory, also of one that has a state beside it."""
    found = model.card().get("memory_length")
    return found if isinstance(found, int) else model.memory_length


def carries(model: models.Model) -> str:
    """What a model carries from segment to segment, in words."""
    length, state = memory(model), model.memory_length is None
    if length is None:
        return "a state"
    return f"a state and a memory of {length:,}" if state else f"a memory of {length:,}"


def together(texts: dict[str, str]) -> str:
    """What is said of runs by name; those of which one thing is said share it."""
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(name)
    return "; ".join(f"{', '.join(who)}: {text}" for text, who in names.items())


def ends(lines: Sequence[Line], x: str) -> str:
    """What lines show, in words: where each begins and ends."""
    parts = [
        f"{line.name or 'a line'} from {shown(float(line.y[0]))} at {x} "
        f"{shown(line.x[0])} to {shown(float(line.y[-1]))} at {shown(line.x[-1])}"
        for line in lines
        if len(line.x)
    ]
    return "; ".join(parts) or "nothing"
