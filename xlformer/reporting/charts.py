"""Panels: small pictures of lines, as inline SVG for the page and as a PNG beside it.

A panel is as wide as a telephone, so that no page ever has to shrink it: pages put as
many beside each other as there is room for. Colours of the SVG are variables of the
page, so that it follows day and night.
"""

from __future__ import annotations

import dataclasses
import io
import re
import warnings
from collections.abc import Sequence

import numpy as np
from etils import epath

from xlformer import pictures
from xlformer.reporting import style
from xlformer.reporting.page import Html

WIDTH, HEIGHT = 350, 250  # of a panel, in the pixels of a page
ROW = 15  # of a legend
MOST_POINTS = 400  # of a line; no panel can show more
MOST_NAMED = 16  # lines that a legend names
LARGEST = 1e30  # beyond it a loss is none, and its axis would overflow
LEAST = 1e-5  # of the highest, what an axis of powers shows
# As many as colours, so that lines differ in grey too.
_DASHES = (
    "-",
    (0, (5, 1.5)),
    (0, (1.5, 1.2)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (10, 2.5)),
    (0, (4, 1.2, 1.2, 1.2, 1.2, 1.2)),
)
_MARKS = "osD^vP"
_INCH = 72  # points, which are the units of matplotlib's SVG
_DOTS = 200  # per inch, of a PNG: sharp on any screen


@dataclasses.dataclass(frozen=True)
class Line:
    """Points under a name; '' is not in the legend. Their y may be NaN: a gap.

    `series` is its colour and dash, by default its place in the panel; `thin` lines are
    context for the others.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    series: int | None = None
    thin: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """What a picture shows.

    Attributes:
      name: of its PNG, without the ending.
      title: above it.
      says: what it shows, for who cannot see it.
      x, y: labels of the axes, with units.
      lines: what is drawn; a panel of lines without any point is no panel.
      log_x, log_y: axes of powers.
      y_from_zero: whether the axis begins at 0.
      marked: a place on x with a dotted line, which the caption explains.
    """

    name: str
    title: str
    says: str
    x: str
    y: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    y_from_zero: bool = False
    marked: float | None = None

    def draw(self, out: epath.Path) -> Html:
        """The inline SVG; writes the PNG into `out`."""
        import matplotlib

        with matplotlib.rc_context(_rules()), warnings.catch_warnings():
            # Of names in scripts that matplotlib's fonts lack; browsers have others.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            named, columns = self._legend()
            # A legend of many rows takes no room from the lines.
            height = HEIGHT + ROW * max(0, -(-named // columns) - 2)
            figure = pictures.figure(WIDTH / _INCH, height / _INCH)
            self._fill(figure)
            if named:
                figure.legend(loc="outside lower left", ncols=columns)
            path = out / f"{self.name}.png"
            path.unlink(missing_ok=True)  # It may be a link to somewhere else.
            pictures.save(figure, path)
            found = io.BytesIO()
            figure.savefig(found, format="svg", metadata={"Date": None})
        return _inline(found.getvalue().decode(), self.name, self.says)

    def _fill(self, figure) -> None:
        axes = figure.subplots()
        for number, line in enumerate(self.lines):
            x, y = _thinned(line.x, line.y)
            series = number if line.series is None else line.series
            options = {
                "color": style.SERIES[series % len(style.SERIES)],
                "linestyle": _DASHES[series % len(_DASHES)],
                "linewidth": 0.7 if line.thin else 1.6,
                "alpha": 0.5 if line.thin else 1.0,
                "label": line.name or None,
            }
            if len(x) <= 12:
                options |= {"marker": _MARKS[series % len(_MARKS)], "markersize": 4}
            axes.plot(x, y, **options)
        self._scale(axes)
        if self.y_from_zero:
            axes.set_ylim(bottom=0)
        if self.marked is not None:
            options = {"color": style.PALE, "linewidth": 1.0, "linestyle": ":"}
            axes.axvline(self.marked, **options)
        axes.set(xlabel=self.x, ylabel=self.y)
        axes.set_title(self.title, loc="left")
        axes.grid(axis="y")

    def _legend(self) -> tuple[int, int]:
        """How many lines a legend names, 0 without one, and in how many columns."""
        names = [line.name for line in self.lines if line.name]
        only = len(names) == len(self.lines) == 1  # The caption names it.
        if only or not 0 < len(names) <= MOST_NAMED:
            return 0, 1
        most = max(1, min(len(names), 54 // (max(map(len, names)) + 7)))
        # matplotlib fills columns: as many as make rows of equal length.
        return len(names), -(-len(names) // -(-len(names) // most))

    def _scale(self, axes) -> None:
        from matplotlib import ticker

        # The own ones write powers as formulas, which are switched off.
        plain = ticker.FuncFormatter(lambda value, _: f"{value:g}")
        if self.log_x:
            zero = any(np.min(line.x, initial=1) <= 0 for line in self.lines)
            # Up to the first point after 0 it is no axis of powers, which has no 0.
            least = min(np.min(line.x[line.x > 0], initial=1e9) for line in self.lines)
            options = {"linthresh": least} if zero else {}
            axes.set_xscale("symlog" if zero else "log", base=2, **options)
            axes.xaxis.set_major_formatter(plain)
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        if self.log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(plain)
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
            low, high = axes.get_ylim()
            if high < 100 * low:  # Hardly a power of ten lies in between.
                axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
                axes.yaxis.set_minor_formatter(plain)
            axes.set_ylim(bottom=max(low, high * LEAST))


def _rules() -> dict:
    """matplotlib's settings for a panel."""
    return {
        "font.family": "sans-serif",
        "font.size": 10.5,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.labelsize": 10.5,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "legend.fontsize": 10,
        "legend.frameon": False,
        "legend.handlelength": 2.2,
        "legend.columnspacing": 1.2,
        "legend.borderpad": 0.2,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": style.PALE,
        "axes.labelcolor": style.INK,
        "axes.titlecolor": style.INK,
        "text.color": style.INK,
        "xtick.color": style.PALE,
        "ytick.color": style.PALE,
        "xtick.labelcolor": style.PALE,
        "ytick.labelcolor": style.PALE,
        "grid.color": style.RULE,
        "grid.linewidth": 0.7,
        "figure.facecolor": style.PAPER,
        "axes.facecolor": "none",
        "savefig.dpi": _DOTS,
        # A name of a stranger's run may hold dollars, which would be formulas.
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "xlformer",
    }


def _thinned(x, y) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS means of neighbours; fewer points stay as they are."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    y = np.where(abs(y) < LARGEST, y, np.nan)
    group = -(-len(x) // MOST_POINTS)
    if group < 2:
        return x, y
    at = np.arange(0, len(x), group)
    size = np.diff(np.append(at, len(x)))
    return np.add.reduceat(x, at) / size, np.add.reduceat(y, at) / size


_VARIABLES = {
    style.INK: "--ink",
    style.PALE: "--pale",
    style.RULE: "--rule",
    style.PAPER: "--paper",
} | {colour: f"--s{i}" for i, colour in enumerate(style.SERIES)}


def _inline(svg: str, name: str, says: str) -> Html:
    """An SVG of matplotlib for use inside a page: no prologue, no names of its own."""
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    size, _, inside = svg[svg.index("<svg") :].partition(">")
    (box,) = re.findall(r'viewBox="([\d. ]+)"', size)
    # In tags alone: what stands between them may be a stranger's.
    inside = re.sub(r"<[^>]+>", lambda tag: _tag(tag.group(), name), inside)
    label = Html.of(says)
    return Html(
        f'<svg role="img" aria-label="{label}" viewBox="{box}">{inside.strip()}'
    )


def _tag(tag: str, name: str) -> str:
    # Of several pictures in one page no two may have a name in common.
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", tag)
    for colour, variable in _VARIABLES.items():
        tag = tag.replace(f": {colour}", f": var({variable})")
    return re.sub(r"\s+", " ", tag)
