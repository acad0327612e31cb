"""Tables and pictures of systems under one budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from xlformer.instruments.instrument import Table
from xlformer.scoring import results


@dataclasses.dataclass(frozen=True)
class Row:
    """A run: a system at a learning rate.

    Attributes:
      value: what systems.run returned; None where it did not.
      why: it did not; see apart.Outcome.
      peak_bytes, seconds: of its process.
    """

    name: str
    system: str
    width: int
    parameters: int
    rate: float
    value: dict[str, Any] | None
    why: str
    peak_bytes: int | None
    seconds: float

    @property
    def validation(self) -> float:
        """Nats per token; infinite where there is no number."""
        found = math.inf if self.value is None else self.value["validation_nats"]
        return found if math.isfinite(found) else math.inf


@dataclasses.dataclass(frozen=True)
class Found:
    """All runs on a corpus; unit: of its vocabulary."""

    budget: Any
    unit: str
    rows: Sequence[Row]

    def best(self) -> list[Row]:
        """Of each system the run with the best validation, the best on test first."""
        systems: dict[str, list[Row]] = {}
        for row in self.rows:
            systems.setdefault(row.system, []).append(row)
        best = [min(rows, key=lambda row: row.validation) for rows in systems.values()]

        def place(row: Row) -> float:
            score = self.test(row)
            return math.inf if score is None or math.isnan(score) else score

        return sorted(best, key=place)

    def test(self, row: Row) -> float | None:
        """Bits per byte, or perplexity; None where there is none."""
        if row.value is None:
            return None
        return results.headline(row.value["test"]["nats_per_token"], self.unit)[1]

    @property
    def score(self) -> str:
        name, _ = results.headline(0.0, self.unit)
        return "bits per byte" if self.unit == "bytes" else name

    def facts(self) -> dict:
        return {
            "budget": self.budget._asdict(),
            "best": [row.name for row in self.best()],
            "runs": [dataclasses.asdict(row) for row in self.rows],
        }


def of(found: Found) -> list[Table]:
    """The systems, best first, and all validations by learning rate."""
    rows = [
        (
            row.system,
            row.width,
            row.parameters,
            row.rate,
            _headline(row, found.unit),
            found.test(row),
            row.value and row.value["tokens_per_s"],
            row.peak_bytes and round(row.peak_bytes / 1e6),
            row.seconds,
        )
        for row in found.best()
    ]
    budget = found.budget
    title = (
        f"{budget.corpus}: {found.score} after {budget.steps} steps of "
        f"{budget.batch_size} rows"
    )
    columns = ("system", "width", "parameters", "rate", "validation", "test")
    more = ("tokens/s", "peak MB", "seconds")
    return [Table(title, (*columns, *more), rows), _rates(found)]


def _rates(found: Found) -> Table:
    rates = sorted({row.rate for row in found.rows})
    by_system: dict[str, dict[float, Row]] = {}
    for row in found.rows:
        by_system.setdefault(row.system, {})[row.rate] = row
    rows = [
        (system, *(_headline(at.get(rate), found.unit) for rate in rates))
        for system, at in by_system.items()
    ]
    title = f"{found.budget.corpus}: {found.score} of validation by learning rate"
    return Table(title, ("system", *(f"{rate:g}" for rate in rates)), rows)


def _headline(row: Row | None, unit: str) -> float | None:
    if row is None or not math.isfinite(row.validation):
        return None
    return results.headline(row.validation, unit)[1]


def draw(corpora: Sequence[Found], figure) -> None:
    """Each system's score on test against how fast it trained."""
    # One look for each system, whatever its place is.
    systems = sorted({row.system for found in corpora for row in found.rows})
    looks = {
        system: {"marker": "os^vDP*X"[i % 8], "color": f"C{i}", "label": system}
        for i, system in enumerate(systems)
    }
    figure.set_size_inches(8, 4.2)
    panels = figure.subplots(1, len(corpora), squeeze=False)[0]
    for axes, found in zip(panels, corpora, strict=True):
        for row in found.best():
            if (score := found.test(row)) is None:
                continue
            thousands = row.value["tokens_per_s"] / 1000
            style = looks[row.system]
            axes.plot([thousands], [score], linestyle="", markersize=9, **style)
        axes.set_title(found.budget.corpus)
        axes.set_xlabel("thousand tokens per second in training")
        axes.set_ylabel(f"{found.score} on test")
        axes.set_xlim(left=0)
        axes.margins(0.15)
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=3
        )
