"""What is known of a model's parameters without making any: shapes, names of axes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax

from xlformer.models.sides import end, is_stacked

if TYPE_CHECKING:
    from xlformer.models.base import Model


def param_axes(params, table: Mapping[str, tuple]):
    """Logical axis names of parameters by the end of their path.

    Args:
      params: a tree of arrays or shapes.
      table: names by 'module/parameter'; a number at the end of either does not count
        ('embedding/table' is table_0 too, 'lstm/input_bias' that of lstm_0). Leaves
        under 'layers' have one more axis in front. What is not in the table is not
        split.
    """

    def name(path, leaf):
        stacked = is_stacked(path)
        names = table.get(end(path), (None,) * (len(leaf.shape) - stacked))
        return (None,) * stacked + tuple(names)

    return jax.tree_util.tree_map_with_path(name, params)


def count(tree) -> int:
    """How many numbers there are in a tree of arrays or of shapes."""
    return sum(x.size for x in jax.tree.leaves(tree))


def abstract_params(model: Model):
    """The shapes of what `init` gives; nothing is made.

    They are kept for equal models: to trace `init` takes 0.1 s of a small one, and a
    run that is loaded and scored asks three times.
    """
    # Nobody gets the containers of another one.
    return jax.tree.map(lambda x: x, _abstract_params(model, jax.config.jax_enable_x64))


@functools.lru_cache(maxsize=64)
def _abstract_params(model: Model, x64: bool):
    return jax.eval_shape(model.init, jax.random.key(0))
