"""What an instrument is: a module that measures something and gives a Result."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from xlformer import storage
from xlformer.instruments.members import Member

# Forms of what an instrument trains or draws: `tiny` is for tests, 20 s at most, and
# `small` takes minutes on two CPU cores; what the docs show is of it.
SIZES = ("small", "tiny")


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked of an instrument.

    Attributes:
      size: of SIZES.
      out: a folder, which is there; what is trained goes to `out / "runs"`.
      members: runs to measure; empty where the instrument trains its own.
      seeds: how many, of an instrument that has SEEDS.
      args: its own flags; see `with_flags`.
    """

    size: str
    out: epath.Path
    members: Sequence[Member] = ()
    seeds: int = 1
    args: argparse.Namespace = dataclasses.field(default_factory=argparse.Namespace)

    def with_flags(self, add_flags: Callable) -> Request:
        """This request, in which flags that are not given have their defaults.

        Who calls an instrument from Python need not give them.
        """
        parser = argparse.ArgumentParser(add_help=False)
        add_flags(parser)
        args = {**vars(parser.parse_args([])), **vars(self.args)}
        return dataclasses.replace(self, args=argparse.Namespace(**args))

    @property
    def runs(self) -> epath.Path:
        """Where runs lie that an instrument trains: another call finds them there.

        Those of `tiny`, and their texts, are no beginning of others.
        """
        folder = self.out / "runs"
        return folder / "tiny" if self.size == "tiny" else folder

    def put(self, name: str, text: str) -> epath.Path:
        """Writes a text that runs are trained on; returns where it lies."""
        folder = self.runs if self.size == "tiny" else self.out
        folder.mkdir(parents=True, exist_ok=True)
        storage.put(folder / name, text)
        return folder / name


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells: texts, numbers, and None for what there is not."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    left: int = 1  # Columns that are texts.


@dataclasses.dataclass(frozen=True)
class Result:
    """What an instrument found.

    Attributes:
      tables: as they are printed.
      facts: all numbers, and what they were measured with; for JSON.
      draw: puts the picture into a matplotlib Figure.
      notes: sentences without which the tables would be misread.
    """

    tables: Sequence[Table]
    facts: Mapping[str, Any]
    draw: Callable[[Any], None]
    notes: Sequence[str] = ()


class Instrument(Protocol):
    """A module in this folder; its docstring is the help of the command."""

    __doc__: str | None
    # Whether --workdir may name what is measured.
    RUNS: bool
    # Seeds by size, where what it trains has a spread; else {}.
    SEEDS: Mapping[str, int]

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Adds what only this instrument asks; defaults may depend on the size."""

    @staticmethod
    def measure(request: Request) -> Result:
        """Measures; UserError for what cannot be, before anything takes long."""
