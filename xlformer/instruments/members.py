"""The runs that an instrument measures beside each other."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from xlformer import command, errors, models, runs, storage
from xlformer.errors import Argument, UserError
from xlformer.models import parameters
from xlformer.runs import locks, stored
from xlformer.scoring import texts
from xlformer.training.run import train

LONGEST_NAME = 100  # characters


@dataclasses.dataclass(frozen=True)
class Member:
    """A run under the name that tables give it.

    Attributes:
      data_paths: where texts of runs lie now, its own among them; () is where its
        config says.
    """

    name: str
    run: runs.Run
    data_paths: Sequence[str] = ()

    @property
    def model(self) -> models.Model:
        return self.run.model

    @property
    def params(self) -> Any:
        return self.run.params

    @property
    def kind(self) -> str:
        """What its model is called; of one's own, whose config is unused, its class."""
        return self.run.config.own_model or self.run.config.model.name

    @property
    def parameters(self) -> int:
        """How many numbers were trained."""
        return parameters.count(self.run.params)

    def text(self, split: str):
        """Tokens of a split of its text, where documents begin, and facts."""
        *others, last = self.data_paths or (None,)
        for path in others:
            try:
                return texts.read(self.run, split, None, path)
            except stored.AnotherText:  # It is that of another run.
                pass
        return texts.read(self.run, split, None, last)

    def facts(self) -> dict:
        """What tells it from others, for JSON."""
        return {
            "name": self.name,
            "run": self.run.config.name,
            "workdir": os.fspath(self.run.workdir),
            "model": self.kind,
            "step": self.run.step,
            **({"steps_averaged": self.run.mean_of} if self.run.mean_of else {}),
            "parameters": self.parameters,
        }


def add_flags(parser) -> None:
    """The flags that name runs, of each command that takes several; see `given`."""
    parser.add_argument(
        "--workdir",
        action="append",
        default=[],
        type=command.place,
        help="of a run; may be repeated",
    )
    parser.add_argument("--checkpoint", help=f"{runs.CHECKPOINT_HELP} (best)")
    parser.add_argument(
        "--data_path",
        action="append",
        default=[],
        type=command.place,
        help="where a run's own text lies now; may be repeated",
    )


def given(args) -> list[Member]:
    """The runs that the flags of `add_flags` name, none without --workdir."""
    paths, checkpoint = args.data_path, args.checkpoint
    asked = {"checkpoint": checkpoint, "data_path": paths[0] if paths else None}
    for name, value in asked.items():
        if value is not None and not args.workdir:
            named = Argument("workdir", "DIR")
            raise UserError(Argument(name, value), " without ", named, ", its run")
    checkpoint = "best" if checkpoint is None else checkpoint
    return load(args.workdir, checkpoint=checkpoint, data_paths=paths)


def load(
    workdirs: Sequence, *, checkpoint: str = "best", data_paths: Sequence[str] = ()
) -> list[Member]:
    """The runs of work directories; UserError where two of them are one run.

    They are called as their configs are, or as their folders where configs repeat.

    Args:
      workdirs, checkpoint: see `runs.load`.
      data_paths: where texts of these runs lie now, in any order.
    """
    places = [storage.path(workdir) for workdir in workdirs]
    if len(data_paths) > len(places):
        line = f" is one of {len(data_paths)} texts, of {len(places)} runs"
        raise UserError(Argument("data_path", data_paths[-1]), line)
    seen: dict[str, epath.Path] = {}
    for place in places:
        real = os.fspath(place)
        real = real if storage.is_remote(place) else os.path.realpath(real)
        if real in seen:
            raise UserError(
                Argument("workdir", seen[real]),
                " and ",
                Argument("workdir", place),
                " are one run, which is compared with itself",
            )
        seen[real] = place
    found = of([runs.load(place, checkpoint=checkpoint) for place in places])
    corpora = [member.run.config.data.corpus for member in found]
    return [
        # A public corpus has no other place; where there is no other, reading says so.
        dataclasses.replace(member, data_paths=tuple(data_paths))
        if corpus == "text" or "text" not in corpora
        else member
        for member, corpus in zip(found, corpora, strict=True)
    ]


def of(found: Sequence[runs.Run]) -> list[Member]:
    """Runs that are loaded already; see `load`."""
    for i, one in enumerate(found):
        for other in found[:i]:
            if _is_copy(one, other):
                raise UserError(
                    Argument("workdir", one.workdir),
                    " is a copy of ",
                    Argument("workdir", other.workdir),
                    ": they are one run, which would be compared with itself",
                )
    names = _names([run.config.name for run in found], [r.workdir for r in found])
    return [Member(name, run) for name, run in zip(names, found, strict=True)]


def _names(names: list[str], places: list[epath.Path]) -> list[str]:
    """A name for each run that no other has, as short as that is possible."""
    for choice in (names, [p.name for p in places], [os.fspath(p) for p in places]):
        if all(choice) and len(set(choice)) == len(choice):
            return choice
    return [f"{place} {i}" for i, place in enumerate(places)]


def plain(members: Sequence[Member]) -> list[Member]:
    """Members under names that a terminal and a picture show as they are.

    A stranger's config may hold anything: what steers terminals, formulas of
    matplotlib, a megabyte. A label that begins with `_` stands in no legend.
    """
    names = [re.sub(r"[^\w .,:;=+@%~/()-]", "_", member.name) for member in members]
    names = [name.lstrip("_ ")[:LONGEST_NAME] for name in names]
    if not all(names) or len(set(names)) < len(names):
        names = [f"{i} {name}" for i, name in enumerate(names, 1)]
    return [
        dataclasses.replace(member, name=name)
        for member, name in zip(members, names, strict=True)
    ]


def file_name(name: str) -> str:
    """A member's name as that of a file: no path, and of no other member."""
    plain = re.sub(r"[^\w.=-]+", "_", name).lstrip(".")
    if plain == name and 0 < len(name) <= 40:
        return name
    return f"{plain[-40:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _is_copy(one: runs.Run, other: runs.Run) -> bool:
    """Whether two runs have the same weights, to the bit."""
    if one.model != other.model or one.step != other.step:
        return False
    pairs = zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def about(member: Member) -> contextlib.AbstractContextManager[None]:
    """Lets a UserError say of which of several runs it is."""
    return errors.about(Argument("workdir", member.run.workdir))


def check_vocabularies(members: Sequence[Member]) -> None:
    """Raises UserError where the ids of two runs stand for different symbols."""
    first = members[0].run.vocabulary
    for member in members[1:]:
        own = member.run.vocabulary
        same = own.kind == first.kind and own.options() == first.options()
        if not same or own.symbols != first.symbols:
            raise UserError(
                Argument("workdir", members[0].run.workdir),
                f" has a vocabulary of {first.size} {first.unit}, ",
                Argument("workdir", member.run.workdir),
                f" another one of {own.size} {own.unit}: losses per token compare only "
                "within one vocabulary",
            )


def text(member: Member, split: str, path: str | None = None):
    """Tokens of a split of a run's text, or of a file, where documents begin, facts."""
    if path is not None:
        return texts.read(member.run, split, path)
    with about(member):
        return member.text(split)


def trained(name: str, config: ConfigDict, folder: epath.Path, model=None) -> Member:
    """Trains a run in `folder / name`, goes on with it, or finds it complete there.

    Args:
      name: of the member, and of its folder.
      config: what `train` takes; it must evaluate, or the last checkpoint counts.
      folder: `Request.runs`.
      model: in place of the config's.
    """
    workdir = folder / name
    begun = (workdir / runs.CONFIG).exists()
    try:
        result = train(config, workdir, model)
    except locks.InUse:  # Another call trains it at this moment.
        raise
    except UserError as error:
        if not begun:
            raise
        # What the line advises is for who trains one run.
        line = (
            "; this run lies in --out from an earlier call: another --out begins anew"
        )
        raise type(error)(*error.parts, line) from error
    if result["interrupted"]:
        raise KeyboardInterrupt
    return Member(name, runs.load(workdir, checkpoint="latest", model=model))
