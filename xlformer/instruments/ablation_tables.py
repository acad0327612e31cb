"""Tables and pictures of the ablation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from xlformer.instruments import attention_lengths as lengths_lib
from xlformer.instruments.ablation_kinds import SHUFFLED_PAPER, Kind
from xlformer.instruments.attention_lengths import Scores
from xlformer.instruments.instrument import Table
from xlformer.instruments.members import Member
from xlformer.scoring import results

# Of each place of the segment, with as few rows as are read at a glance.
PARTS = 4


def of_kinds(
    ordered: Mapping[Kind, Scores], shuffled: Mapping[Kind, Scores]
) -> list[Table]:
    """Table 6, and where lines were shuffled too table 7 and what the memory gains."""
    found = [_table_6(ordered)]
    if shuffled:
        found.append(_table_7(ordered, shuffled))
    pairs = {"in order": memory_gain(ordered), "shuffled": memory_gain(shuffled)}
    found.append(_gains({name: gain for name, gain in pairs.items() if gain}))
    return found


def _table_6(ordered: Mapping[Kind, Scores]) -> Table:
    rows = []
    for kind, scores in ordered.items():
        length, score = lengths_lib.best(scores.by_length)
        initial = scores.by_length[scores.first]
        first, best, at = kind.paper
        rows.append(
            (
                kind.positions,
                "yes" if kind.memory else "no",
                kind.loss,
                statistics.fmean(initial),
                lengths_lib.spread(initial),
                score,
                length,
                first,
                best,
                at,
            )
        )
    columns = ("positions", "memory", "loss", "init", "+-", "best", "at")
    paper = ("paper init", "best", "at")
    title = "table 6: bits per byte at the attention length of training, and at best"
    return Table(title, (*columns, *paper), rows, left=3)


def _table_7(ordered, shuffled) -> Table:
    rows = []
    for kind, scores in shuffled.items():
        row = [kind.positions, "yes" if kind.memory else "no"]
        for found in (ordered[kind].trained, scores.trained):
            row += [statistics.fmean(found), lengths_lib.spread(found)]
        rows.append((*row, SHUFFLED_PAPER[kind]))
    title = "table 7: bits per byte as trained, of lines in order and shuffled"
    columns = ("positions", "memory", "in order", "+-", "shuffled", "+-", "paper")
    return Table(title, columns, rows, left=2)


def memory_gain(found: Mapping[Kind, Scores]) -> list[float] | None:
    """What the memory takes off the loss at each place of the segment, in bits.

    Of the paper's positions and full loss; None where one of the two is not there.
    """
    means = {
        kind.memory: np.mean(scores.by_place, axis=0)
        for kind, scores in found.items()
        if kind.positions == "relative" and not kind.half
    }
    if len(means) < 2:
        return None
    return [results.bits(nats) for nats in (means[False] - means[True]).tolist()]


def _gains(gains: Mapping[str, Sequence[float]]) -> Table:
    rows = []
    places = len(next(iter(gains.values())))
    edges = [places * i // PARTS for i in range(PARTS + 1)]
    for low, high in zip(edges, edges[1:], strict=False):
        means = [statistics.fmean(gain[low:high]) for gain in gains.values()]
        rows.append((f"{low + 1}-{high}", *means))
    rows.append(("all", *map(statistics.fmean, gains.values())))
    title = "bits per byte that the memory gains, by the place in the segment"
    return Table(title, ("place", *gains), rows)


def of_runs(members: Sequence[Member], found: Mapping[str, Scores], unit: str) -> Table:
    """One row for each run that was given; its scores at lengths are of one text."""
    name, _ = results.headline(0.0, unit)
    rows = []
    for member in members:
        scores = found[member.name]
        initial, best, length = None, None, None
        if scores.first in scores.by_length:
            initial = statistics.fmean(scores.by_length[scores.first])
        if scores.by_length:
            length, best = lengths_lib.best(scores.by_length)
        about = member.name, member.kind, member.parameters
        segments = statistics.fmean(scores.trained)
        rows.append((*about, scores.first, initial, best, length, segments))
    columns = ("run", "model", "parameters", "trained at", "init", "best", "at")
    title = (
        f"{name} at the attention length of training, at best, and in whole segments"
    )
    return Table(title, (*columns, "segments"), rows, left=2)


# Pictures -----------------------------------------------------------------------------

MARKERS = {"relative": "o", "Shaw": "s", "Vaswani": "^", "Al-Rfou": "v"}
SHADES = {"relative": "C0", "Shaw": "C1", "Vaswani": "C2", "Al-Rfou": "C3"}


def draw_kinds(ordered, shuffled, segment: int, figure) -> None:
    """Left the full losses against the attention length, right those by place."""
    figure.set_size_inches(8, 4.4)
    left, right = figure.subplots(1, 2)
    for kind, scores in ordered.items():
        if kind.half:
            continue
        memory = "memory" if kind.memory else "none"
        left.errorbar(
            list(scores.by_length),
            [statistics.fmean(values) for values in scores.by_length.values()],
            [lengths_lib.spread(values) or 0 for values in scores.by_length.values()],
            label=f"{kind.positions}, {memory}",
            marker=MARKERS[kind.positions],
            color=SHADES[kind.positions],
            linestyle="-" if kind.memory else "--",
            fillstyle="full" if kind.memory else "none",
            markersize=5,
            capsize=2,
        )
    _label_lengths(left, "bits per byte")
    for order, found, dashes, marker in (
        ("in order", ordered, ("-", "--"), "o"),
        ("shuffled", shuffled, ("-.", ":"), "x"),
    ):
        for kind, scores in found.items():
            if kind.positions != "relative" or kind.half:
                continue
            memory = "memory" if kind.memory else "none"
            bits = [results.bits(x) for x in np.mean(scores.by_place, axis=0)]
            right.plot(
                range(1, segment + 1),
                bits,
                label=f"{order}, {memory}",
                color="C0" if order == "in order" else "C3",
                linestyle=dashes[0 if kind.memory else 1],
                marker=marker,
                fillstyle="full" if kind.memory else "none",
                markersize=4,
                markevery=3,
            )
    _label_places(right, "bits per byte")


def draw_runs(found: Mapping[str, Scores], unit: str, figure) -> None:
    """The same of runs that were given."""
    name, _ = results.headline(0.0, unit)
    left, right = figure.subplots(1, 2)
    figure.set_size_inches(8, 4.4)
    styles = ["-", "--", ":", "-."]
    for i, (run, scores) in enumerate(found.items()):
        style = {"linestyle": styles[i % 4], "marker": "os^vxD"[i % 6], "label": run}
        means = [statistics.fmean(values) for values in scores.by_length.values()]
        if means:
            left.plot(list(scores.by_length), means, **style)
        values = [results.headline(x, unit)[1] for x in scores.by_place[0]]
        right.plot(range(1, len(values) + 1), values, **style, markersize=3)
    _label_lengths(left, name)
    _label_places(right, name)


def _label_lengths(axes, score: str) -> None:
    axes.set_xlabel("attention length in evaluation, tokens")
    axes.set_ylabel(score)
    if axes.get_legend_handles_labels()[1]:
        _legend(axes)


def _label_places(axes, score: str) -> None:
    axes.set_xlabel("place in the segment, tokens")
    axes.set_ylabel(score)
    _legend(axes)


def _legend(axes) -> None:
    # Below: above it there are lines wherever it stands.
    axes.legend(
        fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2
    )
