"""Where each array of another program lies in our trees, and what is wrong with one.

A reader of a program says what it has, a generator of Entry; the rest is here: that
nothing is missing, too many or of another shape, and a tree filled from the arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from xlformer import models
from xlformer.errors import UserError, some
from xlformer.models.parameters import abstract_params


class Entry(NamedTuple):
    """One array of the original: where it lies in our tree, and how it is turned.

    Attributes:
      name: in the original's state dict.
      path: in our tree.
      index: of the part of that leaf: a layer, a slice, or ... for the whole; None is
        an axis of one that the original has more.
      shape: of the array in the original.
      turn: original's layout to that of leaf[index].
      turn_back: the inverse.
      tied: whether an entry before it holds the same numbers.
    """

    name: str
    path: tuple[str, ...]
    index: Any
    shape: tuple[int, ...]
    turn: Any = lambda x: x
    turn_back: Any = lambda x: x
    tied: bool = False

    def leaf(self, tree):
        """Where it lies in a tree of ours."""
        return functools.reduce(operator.getitem, self.path, tree)

    def of(self, tree) -> np.ndarray:
        """What the original has of a tree of ours."""
        return self.turn_back(np.asarray(self.leaf(tree))[self.index])


def grouped(groups: int) -> tuple:
    """turn and turn_back where rows, [G N, ...], are our last axes, [..., G, N]."""
    return (
        lambda x: x.T.reshape(*x.shape[1:], groups, x.shape[0] // groups),
        lambda x: x.reshape(*x.shape[:-2], -1).T,
    )


def lstm(name: str, path: tuple[str, ...], D: int, N: int) -> Iterator[Entry]:
    """The arrays of a layer of PyTorch's LSTM, whose rows are units of four gates."""
    for theirs, ours, shape in (
        ("weight_ih_l0", "input_kernel", (4 * N, D)),
        ("weight_hh_l0", "hidden_kernel", (4 * N, N)),
        ("bias_ih_l0", "input_bias", (4 * N,)),
        ("bias_hh_l0", "hidden_bias", (4 * N,)),
    ):
        yield Entry(f"{name}.{theirs}", (*path, ours), ..., shape, *grouped(4))


def required(state: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in state:
        raise UserError(f"the state dict lacks {name!r}")
    return state[name]


def matrix(state: Mapping[str, np.ndarray], name: str) -> tuple[int, int]:
    """The two sizes of an array that has to be there."""
    x = required(state, name)
    if x.ndim != 2:
        raise UserError(f"{name} has shape {x.shape}, expected a matrix")
    return x.shape


def said(config, hparams: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raises UserError where hparams contradict a config that the shapes have told.

    names: of the original, to our fields.
    """
    for name, ours in names.items():
        found = getattr(config, ours)
        if hparams.get(name, found) != found:
            raise UserError(
                f"hparams: {name}={hparams[name]!r:.50}, the state has {found}"
            )


def check(
    state: Mapping[str, np.ndarray], entries: Iterable[Entry], who: str
) -> list[Entry]:
    """The entries as a list; UserError where the state is not what they say.

    It comes before anything as large as they say is made: no entry is asked for behind
    one that is missing. who: what says the shapes, such as "the hparams say".
    """
    known = {}
    for entry in entries:
        known[entry.name] = entry
        if entry.tied and entry.name not in state:
            continue
        found = required(state, entry.name)
        if found.shape != entry.shape:
            raise UserError(
                f"{entry.name} has shape {found.shape}, {who} {entry.shape}"
            )
        if not np.issubdtype(found.dtype, np.floating):
            raise UserError(f"{entry.name} holds {found.dtype}, expected floats")
    if unexpected := sorted(set(state) - set(known)):
        raise UserError(f"the state dict has unexpected names: {some(unexpected)}")
    return list(known.values())


def zeros(config, dtype) -> dict:
    """A tree of the model's shapes, to be filled."""
    if hasattr(config, "scan_layers"):
        # Scanned or not the parameters are the same; a scan is traced faster.
        config = dataclasses.replace(config, scan_layers=True)
    shapes = abstract_params(models.build(config))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, dtype), shapes)


def fill(config, state: Mapping[str, np.ndarray], entries: Iterable[Entry]) -> dict:
    """The parameters of a state that was checked."""
    # float64 stays float64, for comparisons that rounding must not blur.
    tree = zeros(config, np.result_type(*state.values()))
    for entry in entries:
        if entry.name not in state:
            # Only tied ones may be missing (check), and their leaf is filled already.
            continue
        leaf, turned = entry.leaf(tree), entry.turn(state[entry.name])
        # One of the two would be lost without a word.
        if entry.tied and not np.array_equal(leaf[entry.index], turned):
            raise UserError(
                f"{entry.name} is tied in the hparams but differs in the file"
            )
        leaf[entry.index] = turned
    return tree
