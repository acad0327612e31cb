"""Weights of softmax attention, read and trained on by approximations of it.

    python -m xlformer.compare transfer --out=DIR
    python -m xlformer.compare transfer --workdir=RUN --out=DIR

How often the next symbol is the most probable one: at step 0, where FAVOR+ reads the
weights as they are, and while it is trained on from them. Linformer has weights that no
other mechanism has, and sees what comes after: it begins from the start, and is
compared where all say hidden symbols. RUN is a performer with mechanism=softmax.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from xlformer import runs
from xlformer.errors import Argument, UserError
from xlformer.hosts.faults import NotFinite
from xlformer.instruments import members as members_lib
from xlformer.instruments import readings, transfer_runs
from xlformer.instruments.instrument import Request, Result, Table
from xlformer.instruments.members import Member
from xlformer.instruments.transfer_runs import (
    CONTINUED,
    LINFORMER,
    SIZES,
    SMALL,
    SOFTMAX,
    Sizes,
)
from xlformer.runs.checkpoints import Checkpoints
from xlformer.training import objectives

RUNS, SEEDS = True, {}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, help="of each run that goes on")
    parser.add_argument("--tokens", type=int, help="of validation text that are read")


def measure(request: Request) -> Result:
    """Reads the weights, goes on from them, and shows both."""
    request = request.with_flags(add_flags)
    sizes = SIZES[request.size]
    if request.members:
        sizes = dataclasses.replace(SMALL, config="", masked=False)
    for name in ("steps", "tokens"):
        value = getattr(request.args, name)
        if value is not None and value < 1:
            raise UserError(Argument(name, value), " must be at least 1")
        sizes = sizes if value is None else dataclasses.replace(sizes, **{name: value})
    if request.members:
        studies = [
            _study(request, transfer_runs.given(request.members), sizes, sizes.kinds)
        ]
    else:
        studies = [
            _study(
                request, transfer_runs.own_source(request, sizes), sizes, sizes.kinds
            )
        ]
        if sizes.masked:
            source = transfer_runs.own_source(request, sizes, "causal=False")
            kinds = (SOFTMAX, "positive, redrawn")
            studies.append(_study(request, source, sizes, kinds))
    facts = {**dataclasses.asdict(sizes), "studies": studies}
    tables = [table for study in studies for table in _tables(study)]
    notes = [note for study in studies for note in study["notes"]]
    return Result(tables, facts, lambda figure: draw(figure, studies), notes)


# What is measured ---------------------------------------------------------------------


def _study(request: Request, source: Member, sizes: Sizes, kinds) -> dict:
    """Everything of one source."""
    tokens, _, text = members_lib.text(source, "validation")
    tokens = np.asarray(tokens[: sizes.tokens])
    length = source.run.config.train.segment_length
    objective = objectives.build(source.run.config.train, source.model)
    own = readings.model_of(source.model).config.projection_rows
    first = readings.at_first(
        source.model,
        source.params,
        objective,
        tokens,
        length,
        maps=sizes.maps,
        draws=sizes.draws,
        counts=[own * times for times in sizes.more],
    )

    def curve(member: Member, begin: Mapping) -> dict[int, float]:
        checkpoints = Checkpoints(
            member.run.workdir / runs.CHECKPOINTS, read_only=True
        ).steps()
        found = dict(begin)
        for step in checkpoints:
            run = runs.load(member.run.workdir, checkpoint=step)
            # By the draw of the last step that was trained.
            drawn_at = [max(step - 1, 0)]
            arguments = run.model, run.params, objective, tokens, length, drawn_at
            found[step] = readings.read(*arguments)[0].accuracy
        return found

    curves, notes = {}, []

    def followed(kind: str, steps: int, begin: Mapping) -> Mapping:
        try:
            member = transfer_runs.continued(request, source, sizes, kind, steps)
        # It says something of its kind.
        except NotFinite as error:
            if kind == SOFTMAX:
                raise
            notes.append(f"{kind}: {error}")
            return begin
        return curve(member, begin)

    for kind in kinds:
        begin = {}
        if kind in CONTINUED:
            model = source.model
            if kind != SOFTMAX:
                options = {"redraw_interval": sizes.redraw, **CONTINUED[kind]}
                model = readings.model_of(model, **options)
            arguments = model, source.params, objective, tokens, length
            begin = {0: readings.read(*arguments)[0].accuracy}
        curves[kind] = followed(kind, sizes.steps, begin)
    study = {
        "source": source.facts(),
        "causal": source.model.causal,
        "objective": source.run.config.train.objective,
        "text": text,
        "tokens": len(tokens),
        "segment_length": length,
        "most_frequent": readings.most_frequent(tokens),
        "own_rows": own,
        "steps": sizes.steps,
        "learning_rate": float(source.run.config.optimizer.learning_rate),
        "at_first": first,
        "curves": curves,
        "from_the_start": {},
    }
    if source.model.causal:
        notes.append(
            "linformer is not here: it projects the whole length, later symbols too, "
            "and cannot say the next one"
        )
    else:
        steps = sizes.source_steps if sizes.config else sizes.steps
        study["from_the_start"] = {
            SOFTMAX: curve(source, {}) if sizes.config else {},
            LINFORMER: followed(LINFORMER, steps, {}),
        }
    notes.append(
        f"{study['objective']}: one run of each kind (one seed), with the source's "
        f"learning rate and schedule; {study['most_frequent']:.4f} is the accuracy of "
        "always saying the most frequent symbol"
    )
    return {**study, "notes": notes}


# What is shown ------------------------------------------------------------------------


def _tables(study: Mapping) -> list[Table]:
    said = "next symbol" if study["causal"] else "hidden symbols"
    lines = [
        (
            one["reading"],
            one["rows"],
            one["accuracy"],
            one["standard_deviation"],
            one["nats"],
            one["draws"],
        )
        for one in study["at_first"]
    ]
    columns = ("read by", "rows m", "accuracy", "s.d.", "nats", "draws")
    tables = [Table(f"softmax weights at step 0: {said}", columns, lines)]
    for title, curves in (
        (f"accuracy while trained on, by step: {said}", study["curves"]),
        (f"accuracy from the start, by step: {said}", study["from_the_start"]),
    ):
        steps = sorted({step for curve in curves.values() for step in curve})
        if steps:
            lines = [(kind, *map(curve.get, steps)) for kind, curve in curves.items()]
            tables.append(Table(title, ("", *map(str, steps)), lines))
    return tables


def draw(figure, studies: Sequence[Mapping]) -> None:
    """A panel for each source, and one of what began from the start."""
    panels = [(study, "curves") for study in studies]
    panels += [(s, "from_the_start") for s in studies if s["from_the_start"]]
    rows = -(-len(panels) // 2)
    figure.set_size_inches(8, 1 + 2.8 * rows)
    grid = figure.subplots(rows, min(len(panels), 2), squeeze=False)
    all_axes = [*grid.flat]
    shown = {}
    for axes, (study, name) in zip(all_axes, panels, strict=False):
        said = "next symbol" if study["causal"] else "hidden symbols"
        for kind, curve in study[name].items():
            # One look for each kind, in whatever panel.
            number = shown[kind][0] if kind in shown else len(shown)
            (line,) = axes.plot(
                list(curve),
                list(curve.values()),
                color=f"C{number}",
                marker="osv^Dx*"[number % 7],
                ls=("-", "--", "-.", ":")[number % 4],
                ms=5,
                lw=1,
            )
            shown[kind] = number, line
        frequent = axes.axhline(study["most_frequent"], color="gray", lw=0.8)
        begun = "trained on" if name == "curves" else "from the start"
        axes.set(xlabel="steps", ylabel="accuracy", ylim=(0, None))
        axes.set_title(f"{said}: {begun}")
        axes.locator_params(axis="x", nbins=6, integer=True)
    for axes in all_axes[len(panels) :]:
        axes.axis("off")
    lines = [line for _, line in shown.values()]
    labels = [*shown, "the most frequent symbol"]
    figure.legend([*lines, frequent], labels, loc="outside lower center", ncols=3)
