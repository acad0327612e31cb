"""What a model of one's own must be, said in a line before anything is compiled."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from xlformer.errors import UserError
from xlformer.models.base import Model

DEFINED = ("init", "init_state", "state_axes", "apply")


def check(model) -> None:
    """Raises UserError where `model` is no whole Model; what it computes is not asked.

    That is for `testing.check_model`.
    """
    if not isinstance(model, Model):
        what = f"the class {model.__qualname__}" if isinstance(model, type) else model
        raise UserError(
            f"model is {what!s:.50}, not an object of a subclass of "
            "xlformer.models.Model"
        )
    who = type(model).__qualname__
    for name in DEFINED:
        if getattr(type(model), name) is getattr(Model, name):
            raise UserError(f"{who} does not define {name}, which every model has to")
    try:  # Compiled functions are kept for equal models.
        hash(model)
    except TypeError as error:
        line = f"{who} has a config that is not hashable: {error}"
        raise UserError(line + "; a frozen dataclass without lists is") from error
    if not dataclasses.is_dataclass(model.config):
        kind = type(model.config).__qualname__
        raise UserError(f"{who} has a config that is no frozen dataclass but a {kind}")
    size = getattr(model, "vocab_size", None)
    if not isinstance(size, int | np.integer):
        raise UserError(f"{who} has vocab_size={size!r:.50}, not a number of ids")
    _check_state(model, who)


def _check_state(model: Model, who: str) -> None:
    rows = 2
    state = jax.eval_shape(lambda: model.init_state(rows))
    structure, axes = jax.tree.structure(state), model.state_axes()
    try:
        names = structure.flatten_up_to(axes)
    except ValueError as error:
        line = f"{who}.state_axes() is {axes!r:.99}, where init_state gives {structure}"
        raise UserError(line) from error
    for leaf, name in zip(jax.tree.leaves(state), names, strict=True):
        fits = isinstance(name, tuple | list) and len(name) == leaf.ndim
        if not (fits and ("batch", rows) in zip(name, leaf.shape, strict=True)):
            raise UserError(
                f"{who}.state_axes() says {name!r:.99} of an array that is "
                f"{leaf.shape} in init_state({rows}): each axis is named, or None, and "
                "that of the rows is 'batch'"
            )
