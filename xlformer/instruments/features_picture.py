"""The picture of `features`: a map, its slice, small values, the error against m."""

from __future__ import annotations

import numpy as np

from xlformer.instruments import estimators
from xlformer.instruments.estimators import FORMULAS, MAPS, POSITIVE

LENGTHS = (0.5, 1.0, 1.5, 2.0)  # of which there are draws
SLICE, LOW = 1.0, 1.5  # lengths of the slice, and of small values of the kernel


def draw(figure, facts: dict) -> None:
    """Map, slice, small values of the kernel, and the error against m."""
    figure.set_size_inches(9, 7)
    (map_, slice_), (low, falls) = figure.subplots(2, 2)
    _draw_map(figure, map_, facts["kernel"])
    _draw_slice(slice_, facts["kernel"])
    _draw_low(low, facts["kernel"], facts["m"])
    _draw_falling(falls, facts["attention"])


def _sampled_ratios(kernel: list[dict], length: float):
    """Angles, log10 of the ratio of sampled errors, and its standard error."""
    positive, trigonometric = (
        {one["angle"]: one for one in _drawn(kernel, name, length)}
        for name in FORMULAS[:2]
    )
    angles = sorted(set(positive) & set(trigonometric))
    both = [(trigonometric[a], positive[a]) for a in angles]
    logs = [np.log10(t["squared_error"] / p["squared_error"]) for t, p in both]
    errors = [
        np.hypot(*(x["squared_error_se"] / x["squared_error"] for x in pair))
        / np.log(10)
        for pair in both
    ]
    return np.array(angles), np.array(logs), np.array(errors)


def _draw_map(figure, axes, kernel) -> None:
    angle, length = np.meshgrid(np.linspace(0, np.pi, 200), np.linspace(0.02, 2.1, 150))
    with np.errstate(divide="ignore"):
        log = np.log10(estimators.ratio(angle, length))
    style = {"cmap": "RdBu_r", "vmin": -3, "vmax": 3}
    image = axes.pcolormesh(angle / np.pi, length, np.clip(log, -9, 9), **style)
    image.set_rasterized(True)
    lines = axes.contour(
        angle / np.pi, length, log, levels=(-1, 0, 1, 2), colors="k", linewidths=0.7
    )
    axes.clabel(lines, fontsize=7)
    for one in LENGTHS:
        angles, logs, _ = _sampled_ratios(kernel, one)
        where = angles / np.pi, np.full(len(angles), one)
        axes.scatter(*where, c=logs, edgecolors="k", s=40, linewidths=0.6, **style)
    axes.set(xlabel="angle / pi", ylabel="length |x| = |y|")
    axes.set_title("log10 MSE trigonometric / positive\n(circles: sampled)", size=9)
    figure.colorbar(image, ax=axes, extend="both")


def _draw_slice(axes, kernel) -> None:
    angle = np.linspace(0.02, 0.98, 200) * np.pi
    axes.plot(angle / np.pi, np.log10(estimators.ratio(angle, SLICE)), "k-", lw=1)
    angles, logs, errors = _sampled_ratios(kernel, SLICE)
    axes.errorbar(angles / np.pi, logs, 2 * errors, fmt="o", ms=4, capsize=2)
    axes.axhline(0, color="gray", lw=0.8)
    axes.set(xlabel="angle / pi", ylabel="log10 of the ratio")
    axes.set_title(f"at length {SLICE:g}: line by formula,\ncircles sampled", size=9)


def _draw_low(axes, kernel, m: int) -> None:
    angle = np.linspace(0.5, 0.99, 200) * np.pi
    value = estimators.kernel(angle, LOW)
    for name, line, mark in zip(FORMULAS, ("-", "--", ":"), "os^", strict=True):
        error = np.sqrt(estimators.squared_error(name, angle, LOW, m)) / value
        (drawn,) = axes.plot(value, error, line, lw=1)
        shown = [one for one in _drawn(kernel, name, LOW) if one["kernel"] <= 1]
        axes.plot(
            [one["kernel"] for one in shown],
            [one["squared_error"] ** 0.5 / one["kernel"] for one in shown],
            mark,
            color=drawn.get_color(),
            ms=4,
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="kernel exp(x.y)")
    axes.set_ylabel("RMS error / kernel")
    axes.set_title(f"small values, length {LOW:g}, m = {m}", size=9)
    axes.legend(fontsize=7)


def _draw_falling(axes, attention: dict) -> None:
    marks = dict(zip(MAPS, "os^v", strict=True))
    for one in attention["errors"]:
        least = one["scale"] == min(attention["scales"])
        iid = one["rows"] == "iid"
        if iid and not (least and one["features"] == POSITIVE):
            continue
        if not least and one["scale"] < max(attention["scales"]):
            continue
        axes.errorbar(
            attention["counts"],
            one["rms_error"],
            one["standard_deviation"],
            color=f"C{MAPS.index(one['features'])}",
            marker=marks[one["features"]],
            ls=":" if iid else "-" if least else "--",
            fillstyle="none" if iid else "full",
            ms=4,
            lw=1,
            label=f"{one['features']},\n{one['rows']}" if least else None,
        )
    axes.set(xscale="log", yscale="log", xlabel="m", ylabel="RMS error of attention")
    axes.set_xticks(attention["counts"], attention["counts"], fontsize=7)
    axes.minorticks_off()
    small, *_, large = sorted(attention["scales"])
    axes.set_title(f"norms {small:g}, and {large:g} dashed", size=9)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _drawn(kernel: list[dict], name: str, length: float):
    """Of one map and length with independent rows, what is shown as sampled."""
    return [
        one
        for one in kernel
        if (one["features"], one["rows"], one["length"]) == (name, "iid", length)
        and one["trusted"]
    ]
