"""What `tasks` found, as tables and as a picture."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence

from xlformer.instruments.instrument import Result, Table
from xlformer.instruments.sequences import TASKS

# By member in order: told apart without colours, too.
MARKERS = "os^Dvx*P"
STYLES = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)))


def result(found: Sequence[dict]) -> Result:
    """The Result of runs, each a dict of its settings and what it came to."""
    tasks = list(dict.fromkeys(one["settings"]["task"] for one in found))
    sets = sorted({one["settings"]["set"] for one in found})
    tables = [_by_difficulty(found, task, sets[-1]) for task in tasks]
    tables.append(_by_set(found, tasks, sets))
    of = "means over seeds ± their standard deviations"
    if len({one["settings"]["seed"] for one in found}) == 1:
        of = "one seed, which shows no spread"
    if any(_ponders(one) for one in found):
        tables += [_steps(found, task, sets[-1]) for task in tasks]
    return Result(
        tables,
        {"runs": list(found)},
        functools.partial(_draw, found=found, tasks=tasks, sets=sets),
        [
            f"Percent of characters/sequences, where these differ: {of}. Training had "
            "the difficulties with a *."
        ],
    )


def _by_difficulty(found, task: str, size: int) -> Table:
    """How right each model is at each difficulty, after the largest set."""
    levels, hardest = _levels(found, task), _settings(found, task)["hardest"]
    rows = []
    for member in _members(found, task):
        runs = _of(found, task, member, size)
        cells = []
        for i in range(len(levels)):
            both = [
                _percent([run["by_difficulty"][i][kind] for run in runs])
                for kind in ("characters", "sequences")
            ]
            # One character is the whole answer.
            cells.append(both[0] if both[0] == both[1] else "/".join(both))
        rows.append((member, f"{runs[0]['parameters']:,}", *cells))
    heads = [f"{n}{'*' * (n <= hardest)}" for n in levels]
    title = (
        f"{task}: right by {TASKS[task].unit}, of {size:,} sequences with at most "
        f"{hardest}"
    )
    return Table(title, ("model", "parameters", *heads), rows)


def _by_set(found, tasks, sets) -> Table:
    """How right each model is at the hardest of the training, by the set's size."""
    rows = []
    for task in tasks:
        i = _hardest(found, task)
        for member in _members(found, task):
            cells = [
                _percent(_each(found, task, member, size, i, "sequences"))
                for size in sets
            ]
            rows.append((task, member, *cells))
    heads = [f"{size:,}" for size in sets]
    title = "sequences right by the size of the training set, at its own hardest"
    return Table(title, ("task", "model", *heads), rows, left=2)


def _steps(found, task: str, size: int) -> Table:
    """The mean steps of those that ponder, by difficulty."""
    levels, rows = _levels(found, task), []
    for member in _members(found, task):
        if _ponders(_of(found, task, member, size)[0]):
            cells = [
                _spread(_each(found, task, member, size, i, "steps"))
                for i in range(len(levels))
            ]
            rows.append((member, *cells))
    title = f"{task}: mean steps of a token by {TASKS[task].unit}"
    return Table(title, ("model", *map(str, levels)), rows)


# What was found -----------------------------------------------------------------------


def _settings(found, task: str) -> dict:
    return next(x["settings"] for x in found if x["settings"]["task"] == task)


def _levels(found, task: str) -> list[int]:
    return _settings(found, task)["asked"]


def _hardest(found, task: str) -> int:
    """Which of the test's difficulties is the last that training had."""
    hardest = _settings(found, task)["hardest"]
    return max(i for i, n in enumerate(_levels(found, task)) if n <= hardest)


def _members(found, task: str) -> list[str]:
    names = (x["settings"]["member"] for x in found if x["settings"]["task"] == task)
    return list(dict.fromkeys(names))


def _of(found, task: str, member: str, size: int) -> list[dict]:
    """The seeds of one model on one set."""
    asked = {"task": task, "member": member, "set": size}
    return [x for x in found if asked.items() <= x["settings"].items()]


def _each(found, task, member, size, level: int, kind: str) -> list[float]:
    runs = _of(found, task, member, size)
    return [run["by_difficulty"][level][kind] for run in runs]


def _ponders(run: dict) -> bool:
    return run["by_difficulty"][0]["steps"] is not None


def _spread(values: Sequence[float], times: int = 1, digits: int = 2) -> str:
    """The mean, and how far several values are apart."""
    found = [statistics.mean(values)]
    found += [statistics.stdev(values)] if len(values) > 1 else []
    return "±".join(f"{times * x:.{digits}f}" for x in found)


def _percent(shares: Sequence[float]) -> str:
    return _spread(shares, times=100, digits=0)


# The picture --------------------------------------------------------------------------


def _draw(figure, *, found, tasks, sets) -> None:
    """A row of panels for each task, and one for what ponders."""
    ponders = any(_ponders(one) for one in found)
    figure.set_size_inches(8, 2.6 * (len(tasks) + ponders))
    axes = figure.subplots(len(tasks) + ponders, 2, squeeze=False)
    for (left, right), task in zip(axes, tasks, strict=False):
        levels, i = _levels(found, task), _hardest(found, task)
        for number, member in enumerate(_members(found, task)):
            of = functools.partial(_each, found, task, member)
            values = [of(sets[-1], k, "characters") for k in range(len(levels))]
            _line(left, range(len(levels)), values, number, member)
            _line(right, sets, [of(n, i, "sequences") for n in sets], number, member)
        _by_level(left, task, levels)
        # On its right is what training did not have.
        left.axvline(i + 0.5, color="0.6", linewidth=1, linestyle=":")
        left.set(title=f"{task}, by {TASKS[task].unit}", ylabel="characters right")
        right.set(xlabel="sequences in the training set", ylabel="sequences right")
        right.set(title=f"{task}, by training set", xscale="log")
        right.set_xticks(sets, [f"{size:,}" for size in sets])
        right.minorticks_off()
        for panel in (left, right):
            panel.set_ylim(-0.05, 1.05)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5
    )
    if ponders:
        for panel, unit in zip(axes[-1], ("digits", "attractors"), strict=True):
            those = [task for task in tasks if TASKS[task].unit == unit]
            _draw_steps(panel, found=found, tasks=those, size=sets[-1])


def _by_level(axes, task: str, levels: Sequence[int]) -> None:
    """Difficulties at equal distances."""
    axes.set_xticks(range(len(levels)), [str(n) for n in levels])
    axes.set_xlim(-0.3, len(levels) - 0.7)
    axes.set_xlabel(TASKS[task].unit)


def _draw_steps(axes, *, found, tasks: Sequence[str], size: int) -> None:
    """Mean steps, of tasks with one unit."""
    if not tasks:
        axes.axis("off")
        return
    number = 0
    for task in tasks:
        levels = _levels(found, task)
        for member in _members(found, task):
            if _ponders(_of(found, task, member, size)[0]):
                of = functools.partial(_each, found, task, member, size)
                values = [of(i, "steps") for i in range(len(levels))]
                _line(axes, range(len(levels)), values, number, f"{task}: {member}")
                number += 1
        _by_level(axes, task, levels)
    axes.set(title="pondering", ylabel="mean steps of a token")
    axes.legend(fontsize=7)


def _line(axes, x, values, number: int, label: str) -> None:
    """Means of the seeds, with the least and the largest of them."""
    means = [statistics.mean(each) for each in values]
    low = [m - min(each) for m, each in zip(means, values, strict=True)]
    high = [max(each) - m for m, each in zip(means, values, strict=True)]
    axes.errorbar(
        x,
        means,
        (low, high),
        marker=MARKERS[number % len(MARKERS)],
        linestyle=STYLES[number % len(STYLES)],
        markersize=4,
        linewidth=1.2,
        capsize=2,
        label=label,
    )
