"""What a run's log says of its training: curves, throughput, where the time went."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from xlformer.reporting.charts import Line, Panel
from xlformer.reporting.page import Rows, Section, Text, clean
from xlformer.reporting.subject import Scale, Subject, ends, together
from xlformer.runs import goodput, log


class History:
    """The logs of all runs, read once."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.logs = {m.name: _log(m.run.workdir) for m in subject.members}
        sizes = {
            m.name: m.run.config.train.batch_size * m.run.config.train.segment_length
            for m in subject.members
        }
        # Steps of different sizes do not compare; the tokens that were read do.
        self._alike = len(set(sizes.values())) == 1
        self._sizes = dict.fromkeys(sizes, 1) if self._alike else sizes
        self.x = "step" if self._alike else "tokens read"

    def lines(self, kind: str, key: str, convert=lambda y: y) -> list[Line]:
        """A line a run: what its records of a kind have under a key."""
        found = []
        for series, member in enumerate(self.subject.members):
            points = [
                (r["step"] * self._sizes[member.name], convert(r[key]))
                for r in self.logs[member.name]
                if r["kind"] == kind and isinstance(r.get(key), float)
            ]
            x, y = zip(*points, strict=True) if points else ((), ())
            y = np.array([v if math.isfinite(v) else math.nan for v in y])
            found.append(Line(member.name, np.array(x, float), y, series))
        return [line for line in found if np.isfinite(line.y).any()]

    def panel(self, name: str, title: str, y: str, lines, **options) -> Panel:
        says = f"{title}, {y}: {ends(lines, self.x)}"
        return Panel(name, title, says, self.x, y, lines, **options)

    def missing(self, lines: Sequence[Line], what: str) -> list[Text]:
        """A line for each run whose log does not have it."""
        there = {line.name for line in lines}
        return [
            Text(f"{m.name}: its log has no {what}.", "missing")
            for m in self.subject.members
            if m.name not in there
        ]


def curves(history: History) -> Section:
    """Losses in training and validation, the learning rate, the gradient's norm."""
    members = history.subject.members
    scale = Scale.common(members)
    training = history.lines("train", "train/loss_nats", scale.of)
    validation = history.lines("eval", "eval/nats_per_token", scale.of)
    label, options = scale.label, {"log_y": scale.is_power}
    panels = [
        history.panel("training-loss", "Training", label, training, **options),
        history.panel("validation-loss", "Validation", label, validation, **options),
    ]
    rates = history.lines("train", "train/learning_rate")
    norms = history.lines("train", "norm/grad")
    panels.append(history.panel("learning-rate", "Learning rate", "rate", rates))
    panels.append(
        history.panel(
            "gradient-norm", "Norm of the gradient", "norm", norms, log_y=True
        )
    )
    figures = history.subject.draw(panels, _caption(members))
    missing = history.missing(training, "training loss")
    missing += history.missing(validation, "validation")
    return Section("curves", "Training curves", [*figures, *missing])


def _caption(members) -> str:
    how = {}
    for member in members:
        train, most = member.run.config.train, member.run.config.eval.max_tokens
        when = f"every {train.eval_every}" if train.eval_every else "at the end"
        how[member.name] = (
            f"a record every {train.log_every} steps, validation of "
            f"{f'{most:,}' if most else 'all'} tokens {when}"
        )
    return (
        "From the log of each run. A training loss is the mean over the steps since "
        f"the record before, with dropout where there is any. {together(how)}."
    )


def throughput(history: History) -> Section:
    """Tokens per second, and what became of the wall clock."""
    lines = history.lines("train", "perf/tokens_per_s")
    label = "tokens per second"
    panel = history.panel("throughput", "Throughput", label, lines, y_from_zero=True)
    caption = (
        "Tokens per second between two records of the log, without validation and "
        "saving. On another machine, or beside other work, it is another number."
    )
    blocks = history.subject.draw([panel], caption)
    blocks += history.missing(lines, "throughput")
    columns = {}
    for member in history.subject.members:
        found = _goodput(member.run.workdir)
        if found is None:
            text = f"{member.name}: its log does not say where the time went."
            blocks.append(Text(text, "missing"))
            continue
        steady = [line.y for line in lines if line.name == member.name]
        median = float(np.nanmedian(steady[0])) if steady else None
        columns[member.name] = {"tokens per second (median)": median} | found
    if columns:
        names = dict.fromkeys(x for column in columns.values() for x in column)
        rows = [[name, *(c.get(name) for c in columns.values())] for name in names]
        caption = (
            "Goodput: the share of the wall clock, from the first start to the last "
            "record, that went into steps which were not repeated; in %"
        )
        blocks.append(Rows(caption, ["", *columns], rows))
    return Section("throughput", "Throughput and goodput", blocks)


def _log(workdir) -> list[dict]:
    try:
        return log.read(workdir)
    except OSError:
        return []


def _goodput(workdir) -> dict | None:
    """What became of the wall clock, in %; None where the log does not say it."""
    try:
        found = goodput.summary(goodput.read(workdir))
    except OSError:
        return None
    wall = found["goodput/wall_s"]
    if not (math.isfinite(wall) and wall > 0):
        return None
    get = {name.removeprefix("goodput/"): value for name, value in found.items()}
    shares = {
        f"{clean(name).replace('_', ' ')}, %": round(100 * get[f"{name}_s"] / wall, 2)
        for name in [*goodput.CATEGORIES, "between"]
    }
    return {
        "goodput, %": round(100 * get["ratio"], 2),
        "wall clock, s": wall,
        **shares,
        "repeated steps": int(get["repeated_steps"]),
        "restarts": int(get["restarts"]),
    }
