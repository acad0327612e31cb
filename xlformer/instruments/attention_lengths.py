"""Scores of models at several attention lengths, and by place in the segment.

The attention length is how many positions each layer sees before the segment that a
token is read in: those of a memory, or, in a model without one, of a window that is
read again for each segment.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from xlformer.errors import Argument, UserError
from xlformer.instruments.members import Member, about
from xlformer.models import Model
from xlformer.scoring import results, rows
from xlformer.scoring.evaluator import Evaluator
from xlformer.scoring.settings import EvalSettings

ROWS = 16  # that a text is read in, where a model's reach has a bound
# Means that differ by less are one: what it takes to reach them compares.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Reading:
    """A model as it reads, and the tokens of a segment."""

    model: Model
    segment: int


def at_length(model: Model, length: int, *, segment: int) -> Reading | None:
    """How a model reads that was trained in such segments; None where it cannot.

    In short segments, so that all tokens see about as many: quarters of a trained one.
    Positions that count in the segment mean something in whole ones only, and there a
    memory is read as it was trained.
    """
    part = max(1, segment // 4)
    if model.memory_length is None:
        return None
    if model.memory_length:
        part = segment if model.positions_from_end else part
        return Reading(model.for_reading(memory_length=length), part)
    if model.longest_segment is not None and length + part > model.longest_segment:
        return None
    window = EvalSettings(segment_length=length + part, stride=part)
    return Reading(window.model(model), part)


def trained_length(model: Model, segment: int) -> int | None:
    """The attention length of training: its memory, or what makes a window of it."""
    return model.memory_length or (
        None if model.memory_length is None else segment - max(1, segment // 4)
    )


def default_lengths(segment: int) -> list[int]:
    """From that of training without a memory to four segments."""
    first = segment - max(1, segment // 4)
    return sorted({first, segment, 3 * segment // 2, *(n * segment for n in (2, 3, 4))})


class Reader:
    """Scores one text in one way, with any parameters: compiled once."""

    def __init__(self, reading: Reading, tokens, documents=None):
        model = reading.model
        if reading.segment >= len(tokens):
            raise UserError(
                f"segments of {reading.segment} tokens are longer than the text, of "
                f"{len(tokens)}"
            )
        bounded = rows.reach(model) is not None
        self._tokens, self._documents = tokens, documents
        self._plan = rows.cut_rows_for(
            model,
            len(tokens),
            batch_size=ROWS if bounded else 1,
            segment_length=reading.segment,
            warmup="exact",
        )
        self._evaluator = Evaluator.of(model, self._plan, None)

    def by_place(self, member: Member) -> results.ByPlace:
        """The nats of each place in the segment."""
        found = results.ByPlace(self._plan)
        self._evaluator.score(
            member.params,
            self._tokens,
            self._plan,
            documents=self._documents,
            step=member.run.step,
            tally=found,
        )
        if not np.isfinite(found.nats):
            with about(member):
                name = type(member.model).__name__
                raise UserError(f"{name} gives a loss that is not finite")
        return found


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of models that differ in their seed, in the unit of `results.headline`.

    Attributes:
      trained: with the segments and the memory of training, one of each seed.
      by_place: the same in nats, of each place of the segment.
      by_length: attention length -> one of each seed; without those it cannot have.
      first: the attention length of training; None for a state without bound.
    """

    trained: Sequence[float]
    by_place: Sequence[Sequence[float]]
    by_length: Mapping[int, Sequence[float]]
    first: int | None

    def facts(self) -> dict:
        return {
            "as_trained": list(self.trained),
            "nats_by_place": [list(x) for x in self.by_place],
            "by_attention_length": {str(k): list(v) for k, v in self.by_length.items()},
            "trained_attention_length": self.first,
        }


def scores(
    members: Sequence[Member], tokens, documents, lengths: Sequence[int], *, most: int
) -> Scores:
    """Reads a text with models of one config, and its first `most` at all lengths.

    In whole segments more of it is read: each place has few of them.
    """
    model, train = members[0].model, members[0].run.config.train
    unit = members[0].run.vocabulary.unit
    reader = Reader(Reading(model, train.segment_length), tokens, documents)
    places = [reader.by_place(member) for member in members]
    first = trained_length(model, train.segment_length)
    by_length = {}
    for length in sorted({*lengths, first} - {None}):
        reading = at_length(model, length, segment=train.segment_length)
        if reading is None:
            continue
        reader = Reader(reading, tokens[:most], documents)
        found = [reader.by_place(member).mean for member in members]
        by_length[length] = [results.headline(nats, unit)[1] for nats in found]
    return Scores(
        [results.headline(place.mean, unit)[1] for place in places],
        [place.mean_T for place in places],
        by_length,
        first,
    )


def check(member: Member) -> None:
    """Raises UserError for a run whose model cannot be measured."""
    with about(member):
        if not member.model.causal:
            raise UserError(
                f"{type(member.model).__name__} sees what comes after a token: no "
                "length of memory or of context is all that it sees"
            )
        # A model of one's own may have a memory of one length only.
        at_length(member.model, 1, segment=member.run.config.train.segment_length)


def check_lengths(lengths: Sequence[int], tokens: int) -> None:
    """Raises UserError for attention lengths that the text has no room for."""
    if max(lengths) >= tokens:
        raise UserError(
            Argument("lengths", ",".join(map(str, lengths))),
            f": {max(lengths)} is not shorter than the text that is read, of {tokens} "
            "tokens",
        )


def best(by_length: Mapping[int, Sequence[float]]) -> tuple[int, float]:
    """The shortest attention length with the least mean, and that mean."""
    means = {length: statistics.fmean(values) for length, values in by_length.items()}
    least = min(means.values())
    return min((k, v) for k, v in means.items() if v <= least + TOLERANCE)


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation over seeds, of a sample; None of one."""
    return statistics.stdev(values) if len(values) > 1 else None
