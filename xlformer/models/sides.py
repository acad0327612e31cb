"""Which parameters are matrices, and which of their axes are the two sides of one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax

# Every leaf below a key of this name has a leading layer axis (but not of a list).
STACKED = "layers"


class Sides(NamedTuple):
    """The axes of a leaf that are the two sides of a matrix; others number matrices.

    Attributes:
      inputs: axes that a product with a vector sums over.
      outputs: axes of what comes out.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def is_stacked(path) -> bool:
    """True for a leaf with a leading layer axis; path is a jax.tree_util key path."""
    names = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
    if STACKED not in names:
        return False
    below = path[names.index(STACKED) + 1 :]
    return not (below and isinstance(below[0], jax.tree_util.SequenceKey))


def by_name(params, table: Mapping[str, tuple]):
    """A tree of Sides, and of None for what is no matrix, by the end of their path.

    table: (inputs, outputs), axes within one layer, by names as those of param_axes.
    """

    def sides(path, leaf):
        del leaf
        found = table.get(end(path))
        if found is None:
            return None
        return Sides(*(tuple(i + is_stacked(path) for i in side) for side in found))

    return jax.tree_util.tree_map_with_path(sides, params)


def of_two_axes(params):
    """The same where nothing is known: what has two axes within a layer is a matrix.

    But not what ends in 'bias'.
    """

    def sides(path, leaf):
        first, named = int(is_stacked(path)), end(path).endswith("bias")
        if len(leaf.shape) - first != 2 or named:
            return None
        return Sides((first,), (first + 1,))

    return jax.tree_util.tree_map_with_path(sides, params)


def end(path) -> str:
    """The last two parts of a path without numbers: they identify a parameter.

    A model may nest its modules as it likes above them.
    """
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path[-2:]]
    return "/".join(re.sub(r"_\d+$", "", key) for key in keys)
