"""The width with which a model has as many parameters as others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from xlformer import config as config_lib
from xlformer import models
from xlformer.errors import UserError
from xlformer.models.parameters import abstract_params, count

STEP = 8  # of widths: four heads of an even width
NEAR = 0.1  # how far, as a share, parameters may be from the budget


class Shape(NamedTuple):
    """A config of a width, and its parameters."""

    config: ConfigDict
    width: int
    parameters: int


def fitting(
    make: Callable[[int], ConfigDict], vocab_size: int, budget: int, *, widest: int
) -> Shape:
    """The width with which a model's own count comes nearest to the budget.

    make: gives the config of a width; parameters must grow with it. Raises UserError
    where no width is within a tenth of the budget.
    """

    @functools.cache
    def shape(width: int) -> Shape:
        config = make(width)
        return Shape(config, width, parameters(config, vocab_size))

    # The widest that does not exceed the budget, and the next.
    low, high = 1, widest // STEP
    while low < high:
        middle = (low + high + 1) // 2
        if shape(middle * STEP).parameters <= budget:
            low = middle
        else:
            high = middle - 1
    near = [shape(n * STEP) for n in (low, min(low + 1, widest // STEP))]
    best = min(near, key=lambda one: abs(one.parameters - budget))
    if abs(best.parameters - budget) > NEAR * budget:
        raise UserError(
            f"{best.config.model.name}: no width gives {budget:,} parameters: "
            f"{best.width} has {best.parameters:,}, more than a tenth off"
        )
    return best


def parameters(config: ConfigDict, vocab_size: int) -> int:
    """How many numbers are trained; nothing is made."""
    size = config_lib.vocab_size(config, vocab_size)
    model = models.build(config.model, size)
    return count(abstract_params(model))
