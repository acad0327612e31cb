"""What an exported model can do: functions of dicts of plain arrays, and their shapes.

    score  (params, memory, tokens, targets, lengths, resets) -> nll, memory
    read   (params, memory, tokens, lengths) -> memory          takes in a prompt
    start  (params, memory) -> cache                            once behind the prompt
    next   (params, cache, token) -> log_probs, cache           one token of each row

The state of a model is a tree of classes of ours. Here it is a dict: each array under
its path, as a checkpoint names it. The memory of `score` is the model's own; that of
`read` belongs to the form that generates, where every token sees equally much.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from xlformer.errors import UserError
from xlformer.generation.continuation import PREFILL
from xlformer.models.base import Model
from xlformer.models.parameters import abstract_params
from xlformer.runs import leaves

BATCH = "b"  # how the number of rows is called where any number will do
BARE = "memory"  # the name of an array that is a state by itself


class Value(NamedTuple):
    """An argument or a result: one array, or a dict of arrays, and what it means."""

    name: str
    shape: Any  # jax.ShapeDtypeStruct, or a dict of them
    meaning: str


class Program(NamedTuple):
    """A function to export."""

    name: str
    function: Callable
    arguments: tuple[Value, ...]
    results: tuple[tuple[str, str], ...]  # names and meanings


class Named:
    """A tree of arrays as a dict of them, each under its path, and back."""

    def __init__(self, tree):
        self._structure = jax.tree.structure(tree)
        self.names = [name or BARE for name in leaves.flatten(tree)]
        self.shapes = self.arrays(tree)

    def tree(self, arrays: dict):
        """The tree whose arrays these are."""
        found = [arrays[name] for name in self.names]
        return jax.tree.unflatten(self._structure, found)

    def arrays(self, tree) -> dict:
        """The arrays of such a tree."""
        return dict(zip(self.names, jax.tree.leaves(tree), strict=True))


class Memory(Named):
    """A model's state as a dict of arrays.

    Attributes:
      shapes: by name, with `rows` rows.
      axes: names of the axes of each, as Model.state_axes has them.
    """

    def __init__(self, one, axes, rows):
        """one: the shapes of a state of one row; axes: of state_axes or cache_axes."""
        super().__init__(one)
        found = self._structure.flatten_up_to(axes)
        self.axes = dict(zip(self.names, map(tuple, found), strict=True))
        self.shapes = {
            name: _with_rows(leaf, self.axes[name], rows)
            for name, leaf in self.shapes.items()
        }


def _with_rows(leaf, names, rows):
    # An array without rows belongs to all of them.
    shape = [
        rows if n == "batch" else s for n, s in zip(names, leaf.shape, strict=True)
    ]
    return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)


def fit(model: Model, dtype: str | None) -> Model:
    """The model as it is exported: attention of XLA's operations, a fixed dtype.

    'auto' stands for what the machine likes that traces, and so would be another
    program on each; it becomes float32.
    """
    if dtype is None and getattr(model.config, "dtype", "") == "auto":
        dtype = "float32"
    model = model.for_reading(dtype=dtype)
    # A kernel of one kind of device runs on no other. Who refuses has none to choose.
    with contextlib.suppress(UserError):
        model = model.for_reading(attention="xla")
    return model


class Scoring:
    """What `score` needs.

    T: targets of a segment; rows: a number, or a symbolic dimension.
    """

    def __init__(self, model: Model, T: int, rows, step: int | None):
        self.model, self.step = model, _step(step)
        self.params = Named(abstract_params(model))
        one = jax.eval_shape(lambda: model.init_state(1))
        self.memory = Memory(one, model.state_axes(), rows)
        inputs = T + model.extended_length
        resets = inputs if model.resets_in_segment else 1
        self.program = Program(
            "score",
            self._score,
            (
                Value("params", self.params.shapes, "the parameters, of params.npz"),
                Value("memory", self.memory.shapes, "initial, or what a call returned"),
                Value(
                    "tokens",
                    _ids(rows, inputs),
                    "ids; the first extended_length of them are context that is read "
                    "again, and have no targets",
                ),
                Value("targets", _ids(rows, T), "what comes after each of the others"),
                Value(
                    "lengths",
                    _ids(rows),
                    "how many tokens count, from the left; the rest is padding, with "
                    "an nll of 0",
                ),
                Value(
                    "resets",
                    jax.ShapeDtypeStruct((rows, resets), bool),
                    "true where a token sees nothing before it: a text begins"
                    + (
                        "" if resets > 1 or inputs == 1 else "; before the segment only"
                    ),
                ),
            ),
            (("nll", "nats of each target"), ("memory", "for the next segment")),
        )

    def _score(self, params, memory, tokens, targets, lengths, resets):
        nll_BT, state, _ = self.model.apply(
            self.params.tree(params),
            tokens,
            targets,
            self.memory.tree(memory),
            resets_BT=resets,
            lengths_B=lengths,
            step=self.step,
        )
        return nll_BT, self.memory.arrays(state)


class Generating:
    """What `read`, `start` and `next` need. Raises UserError where a model cannot."""

    def __init__(self, model: Model, rows, step: int | None):
        self.model, self.step = model.for_generation(), _step(step)
        if type(self.model).log_probs is Model.log_probs:
            self.model.log_probs(None, None, None)  # says that there are none
        params = abstract_params(self.model)
        one = jax.eval_shape(lambda: self.model.init_state(1))
        self.memory = Memory(one, self.model.state_axes(), rows)
        cached = jax.eval_shape(self._cached, params, one)
        axes = self.model.cache_axes(segment_length=1)
        self.cache = Memory(cached, axes, rows)
        self.part = min(PREFILL, self.model.longest_segment or PREFILL)
        self.params = Named(params)
        of_params = Value("params", self.params.shapes, "as for score")
        of_memory = Value(
            "memory", self.memory.shapes, "initial, or of the call before"
        )
        self.programs = (
            Program(
                "read",
                self._read,
                (
                    of_params,
                    of_memory,
                    Value("tokens", _ids(rows, self.part), "a part of a prompt"),
                    Value("lengths", _ids(rows), "how many of them count"),
                ),
                (("memory", "behind them"),),
            ),
            Program(
                "start",
                self._start,
                (of_params, of_memory),
                (("cache", "the memory in the form for single tokens"),),
            ),
            Program(
                "next",
                self._next,
                (
                    of_params,
                    Value(
                        "cache", self.cache.shapes, "of start, or of the call before"
                    ),
                    Value("token", _ids(rows), "the last token of each row"),
                ),
                (
                    ("log_probs", "of every token that may come next, in nats"),
                    ("cache", "behind the token"),
                ),
            ),
        )

    def _cached(self, params, state):
        return self.model.to_cache(params, state, segment_length=1)

    def _read(self, params, memory, tokens, lengths):
        # The nll is not asked for, and the compiler leaves out what would make it.
        _, state, _ = self.model.apply(
            self.params.tree(params),
            tokens,
            tokens,
            self.memory.tree(memory),
            lengths_B=lengths,
            step=self.step,
        )
        return self.memory.arrays(state)

    def _start(self, params, memory):
        state = self._cached(self.params.tree(params), self.memory.tree(memory))
        return self.cache.arrays(state)

    def _next(self, params, cache, token):
        log_probs_B1V, state = self.model.log_probs(
            self.params.tree(params),
            token[:, None],
            self.cache.tree(cache),
            step=self.step,
        )
        return log_probs_B1V[:, 0], self.cache.arrays(state)


def _step(step: int | None):
    return None if step is None else np.int32(step)


def _ids(*shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def symbolic():
    """Any number of rows."""
    (rows,) = export.symbolic_shape(BATCH)
    return rows
