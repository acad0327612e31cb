"""What runs lose on a text: by the place in a segment, and by the memory's length."""

from __future__ import annotations

import functools

import numpy as np

from xlformer import models, sharding
from xlformer.data import shards
from xlformer.errors import UserError
from xlformer.reporting.charts import Line, Panel
from xlformer.reporting.page import Rows, Section
from xlformer.reporting.subject import (
    Scale,
    Subject,
    carries,
    ends,
    memory,
    of_each,
    together,
)
from xlformer.scoring.evaluator import Evaluator
from xlformer.scoring.results import ByPlace
from xlformer.scoring.rows import cut_rows_for
from xlformer.training import objectives

ROWS = 8  # that the text is cut into
PLACES = 32  # at most, that are drawn
# Memories that are tried, in parts of the model's own, or of the segment if that is 0.
LENGTHS = (0, 0.25, 0.5, 1, 2, 4)


def losses(subject: Subject, member, model: models.Model) -> ByPlace:
    """Scores the beginning of the split with a form of the run's model."""
    run = member.run
    tokens, documents, _ = subject.text(member)
    tokens = shards.head(tokens, min(subject.tokens, len(tokens)))
    T = run.config.train.segment_length
    plan = cut_rows_for(
        model,
        len(tokens),
        batch_size=ROWS,
        segment_length=min(T, model.longest_segment or T),
        # Every length of the memory scores the same tokens so.
        warmup="none" if model.memory_length is None else "fill",
    )
    objective = objectives.build(run.config.train, model)
    mesh = sharding.make_mesh({"data": 1})
    tally = ByPlace(plan, objective.causal)
    evaluator = Evaluator.of(model, plan, mesh, objective)
    options = {"documents": documents, "step": run.step, "tally": tally}
    evaluator.score(run.params, tokens, plan, **options)
    return tally


class Measured:
    """All runs with the memory that they have."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.scale = Scale.common(subject.members)

        def measure(member):
            subject.say(f"scoring {member.name}")
            return losses(subject, member, member.model)

        self.found, self.missing = of_each(subject, measure)

    def how(self, names) -> str:
        """With what runs were scored."""
        split, how = self.subject.split or "validation", {}
        for member in self.subject.members:
            if member.name not in names:
                continue
            one, carried = self.found[member.name], carries(member.model)
            plan = one.plan
            how[member.name] = (
                f"{one.targets:,} tokens of {split}, segments of "
                f"{plan.segment_length:,}, {carried}, {len(plan.start_B)} rows, "
                f"warm-up {plan.warmup}"
            )
        return together(how)


def places(measured: Measured) -> Section:
    """Loss by position in the segment: what a model pays where its context begins."""
    scale, lines, rows = measured.scale, [], []
    for series, member in enumerate(measured.subject.members):
        one = measured.found.get(member.name)
        if one is None:
            continue
        T = one.plan.segment_length
        size = -(-T // PLACES)
        edges = range(0, T, size)
        y = [scale.of(one.between(first, first + size)) for first in edges]
        x = [first + (min(size, T - first) - 1) / 2 for first in edges]
        lines.append(Line(member.name, np.array(x), np.array(y), series))
        parts = [(0, T), (0, 1), (0, -(-T // 8)), (T // 2, T)]
        values = [scale.of(one.between(*part)) for part in parts]
        rows.append([member.name, *map(float, values), float(values[2] - values[3])])
    blocks: list = []
    if rows:
        title, x = "By position in the segment", "position in the segment"
        says = f"{scale.label} by position: {ends(lines, 'position')}"
        options = {"log_y": scale.is_power}
        panel = Panel("places", title, says, x, scale.label, lines, **options)
        caption = (
            "Mean loss by the place of a token in its segment. A model that carries "
            "its context from segment to segment loses as much at the beginning as "
            f"later; one that does not begins without any. "
            f"{measured.how(measured.found)}."
        )
        blocks += measured.subject.draw([panel], caption)
        head = ["", "all", "first place", "first eighth", "second half", "difference"]
        caption = (
            f"The same in {scale.label}; the difference is that of the first eighth "
            "and the second half"
        )
        blocks.append(Rows(caption, head, rows))
    return Section("places", "Loss by position", [*blocks, *measured.missing])


def memories(measured: Measured) -> Section:
    """Loss by the length of the memory at evaluation."""
    subject, scale = measured.subject, measured.scale
    found, missing = of_each(subject, functools.partial(_sweep, measured))
    lines, rows, lengths = [], [], sorted({m for one in found.values() for m in one})
    for series, member in enumerate(subject.members):
        if member.name not in found:
            continue
        one = found[member.name]
        y = np.array([scale.of(nats) for nats in one.values()])
        lines.append(Line(member.name, np.array([*one], float), y, series))
        values = [scale.of(one[m]) if m in one else None for m in lengths]
        rows.append([member.name, memory(member.model), *values])
    blocks: list = []
    if lines:
        trained = {memory(m.model) for m in subject.members if m.name in found}
        marked = float(trained.pop()) if len(trained) == 1 else None
        title, x = "By length of the memory", "memory, tokens"
        says = f"{scale.label} by memory: {ends(lines, 'memory')}"
        options = {"log_x": True, "log_y": scale.is_power, "marked": marked}
        panel = Panel("memories", title, says, x, scale.label, lines, **options)
        caption = (
            "Mean loss with a shorter and a longer memory than that of the training, "
            "on the same tokens; a dotted line is that of the training, where it is "
            f"one for all. {measured.how(found)}; the memory as drawn."
        )
        blocks += subject.draw([panel], caption)
        head = ["", "as trained", *(f"{m:,}" for m in lengths)]
        blocks.append(Rows(f"The same in {scale.label}", head, rows))
    return Section("memories", "Loss against memory", [*blocks, *missing])


def _sweep(measured: Measured, member) -> dict[int, float]:
    """Nats per token by length of the memory."""
    own = memory(member.model)
    if own is None:
        raise UserError("it carries a state, which has no length that could be changed")
    if member.name not in measured.found:
        raise UserError("its text could not be scored")
    measured.subject.say(f"scoring {member.name} with other memories")
    T = measured.found[member.name].plan.segment_length
    base = own or T
    found, why = {own: measured.found[member.name].mean}, None
    for length in sorted({round(part * base) for part in LENGTHS} - {own}):
        try:
            model = member.model.for_reading(memory_length=length)
            # A segment that is cut shorter would be another measurement.
            if model.longest_segment is not None and model.longest_segment < T:
                continue
            found[length] = losses(measured.subject, member, model).mean
        except UserError as error:
            why = why or error
    if len(found) == 1 and why is not None:
        raise why
    return dict(sorted(found.items()))
