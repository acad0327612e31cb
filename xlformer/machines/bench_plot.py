"""A plot of what xlformer.bench found: --plot=FILE.svg with --sweep."""

from __future__ import annotations

from collections.abc import Sequence

from xlformer import pictures
from xlformer.errors import Argument, UserError


def plot(rows: list[dict], path) -> None:
    """Tokens a second and memory against the swept field, a line for what is compared.

    Call `check` first.
    """
    measured = [row for row in rows if not row.get("out_of_memory")]
    field = rows[0]["field"]
    figure = pictures.figure()
    axes = figure.subplots(1, 2)
    parts = (("tokens_per_second", 1, "tokens/s"), ("memory", 2**30, "GiB"))
    for axis, (key, unit, label) in zip(axes, parts, strict=True):
        for name in dict.fromkeys(row["compared"] for row in measured):
            points = [
                (float(row["value"]), row[key] / unit)
                for row in measured
                if row["compared"] == name and row[key] is not None
            ]
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set(xlabel=field.rpartition(".")[2], ylabel=label)
        # From 0, or a difference of a tenth looks like one of ten times.
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    if any(row["compared"] for row in measured):
        axes[0].legend()
    about = rows[0]
    figure.suptitle(
        f"{about['config']}, {about['mode']}, {about['devices']} x {about['device']}, "
        f"{about['dtype']}",
        fontsize="medium",
    )
    pictures.save(figure, path)


def check(path, sweep: tuple[str, Sequence[str]]) -> None:
    """Raises UserError where no plot could be made, before anything is timed."""
    field, values = sweep
    if not str(path).endswith(".svg"):
        raise UserError(Argument("plot", path), ": only .svg is known")
    if not field or not all(v.replace(".", "", 1).isdecimal() for v in values):
        swept = f"{field}:{','.join(values)}" if field else ""
        wanted = " needs numbers to plot against: "
        raise UserError(Argument("plot", path), wanted, Argument("sweep", swept))
    pictures.check(Argument("plot", path))
