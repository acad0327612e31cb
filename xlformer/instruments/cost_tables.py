"""What `cost` found, as a table with straight lines and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xlformer.instruments.instrument import Table

# What the recomputing model of Al-Rfou et al. took in the time of one token of
# Transformer-XL, by the attention length: table 9, one GPU.
PUBLISHED = {800: 363, 1800: 773, 2800: 1409, 3800: 1874}
WAYS = ("recurrent", "window", "recomputed")
MARKS = {"recurrent": "o-", "window": "s--", "recomputed": "D:"}


class Line(NamedTuple):
    """y = slope x + intercept, and the share of the variance that it explains."""

    slope: float
    intercept: float
    r2: float


def line(x: Sequence[float], y: Sequence[float]) -> Line:
    """The straight line of least squares."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    slope, intercept = np.polyfit(x, y, 1)
    rest, all_ = y - slope * x - intercept, y - y.mean()
    r2 = 1 - (rest @ rest) / (all_ @ all_) if all_.any() else 1.0
    return Line(float(slope), float(intercept), float(r2))


def ratio(row: Mapping, above: str, below: str) -> float | None:
    """Of two times of a row."""
    times = row[above], row[below]
    return None if None in times else times[0] / times[1]


PAIRS = (
    ("window", "recurrent"),
    ("recomputed", "recurrent"),
    ("recomputed", "window"),
)


def fits(rows: Sequence[Mapping]) -> list[dict]:
    """Of each model and pair of ways, the line of the ratio over the length."""
    found = []
    for name in dict.fromkeys(row["model"] for row in rows):
        for above, below in PAIRS:
            points = [
                (row["length"], ratio(row, above, below))
                for row in rows
                if row["model"] == name and ratio(row, above, below) is not None
            ]
            if len(points) > 2:
                fit = line(*zip(*points, strict=True))._asdict()
                found.append({"model": name, "above": above, "below": below, **fit})
    return found


def table(rows: Sequence[Mapping], several: bool) -> Table:
    columns = ["length", *(f"{above}/{below}" for above, below in PAIRS)]
    columns += ["published", *(f"{way} us" for way in WAYS), "spread %"]
    cells = []
    for row in rows:
        times = [row[way] for way in WAYS]
        spreads = [
            (max(row[f"{way}_seconds"]) - min(row[f"{way}_seconds"])) / row[way]
            for way in WAYS
            if row[way]
        ]
        cells.append(
            [
                *[row["model"]] * several,
                row["length"],
                *(ratio(row, *pair) for pair in PAIRS),
                row["published"],
                *(time and 1e6 * time for time in times),
                100 * max(spreads, default=0.0),
            ]
        )
    title = "time per token, one row, by the length of attention"
    return Table(title, ["model"] * several + columns, cells, left=int(several))


def picture(rows: Sequence[Mapping], fits: Sequence[Mapping]):
    """Draws the times, and the ratio of the third to the first with its line."""

    def draw(figure) -> None:
        times, ratios = figure.subplots(1, 2)
        name = rows[0]["model"]
        mine = [row for row in rows if row["model"] == name]
        for way in WAYS:
            points = [(row["length"], row[way]) for row in mine if row[way]]
            x, y = zip(*points, strict=True) if points else ((), ())
            times.plot(x, np.array(y) * 1e3, MARKS[way], label=way)
        times.set_yscale("log")
        low, high = times.get_ylim()
        times.set_ylim(low, 10 * high)  # room for the legend
        times.set_ylabel("ms per token")
        for fit, mark in zip(fits, "s^Dov<", strict=False):
            if fit["model"] == name and fit["above"] == "recomputed":
                pair = fit["above"], fit["below"]
                x = np.array([row["length"] for row in mine])
                found = [ratio(row, *pair) or np.nan for row in mine]
                label = f"recomputed / {fit['below']}, R2 {fit['r2']:.3f}"
                dots = ratios.plot(x, found, mark, label=label)
                fitted = fit["slope"] * x + fit["intercept"]
                ratios.plot(x, fitted, "--", color=dots[0].get_color(), linewidth=1)
        known = [(row["length"], row["published"]) for row in mine if row["published"]]
        if known:
            ratios.plot(*zip(*known, strict=True), "ko", mfc="none", label="published")
        ratios.set_ylabel("times as long")
        ratios.set_ylim(0, 1.4 * ratios.get_ylim()[1])
        for axes in (times, ratios):
            axes.set_xlabel("attention length (tokens)")
            axes.grid(alpha=0.3)
            axes.legend()

    return draw


def notes(segment: int, fits: Sequence[Mapping]) -> list[str]:
    found = [
        f"recurrent reads {segment} tokens at once, window one at a time: the same "
        "model and memory, so that their ratio is what reading together gains. "
        "published is recomputed/recurrent of another model, on a GPU."
    ]
    for fit in fits:
        if fit["above"] == "recomputed":
            formula = f"{fit['slope']:.3g} length {fit['intercept']:+.3g}"
            what = f"{fit['model']}: recomputed/{fit['below']}"
            found.append(f"{what} = {formula}, R2 {fit['r2']:.4f}")
    return found
