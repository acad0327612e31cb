"""What goes on inside of a model, told to whoever watches while it is traced.

Layers tell what they have at hand, and pay nothing where nobody watches:

    with watching.watch() as told:
        model.apply(...)           # told: what its layers said, in order

It is for one trace: what is told are its arrays, so watch inside of the function that
is compiled, and return them from it. Loops over layers are unrolled meanwhile
(layers.stack), because nothing could leave the body of a loop of JAX's.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Told(NamedTuple):
    """One thing that was told.

    Attributes:
      at: the number of the layer, of the step and the layer, ...; outermost first.
      name: of what is told, where a layer has several of its kind.
      value: of one of the classes below.
    """

    at: tuple[int, ...]
    name: str
    value: Any


class ByDistance(NamedTuple):
    """How much weight heads give to what lies at each distance.

    Attributes:
      weight_HS: summed over queries and rows; its mean is weight_HS / seen_S.
      seen_S: how many queries of all rows see a key at that distance.
    """

    weight_HS: Any
    seen_S: Any


class Gate(NamedTuple):
    """How much of the new a gate lets in: over its units and all positions.

    Attributes:
      mean: of all.
      units_E: the mean of each unit.
    """

    mean: Any
    units_E: Any


class Running(NamedTuple):
    """Which positions take one more step of an adaptive computation: [B, T]."""

    running_BT: Any


class Inside(NamedTuple):
    """What went on inside of a model over a segment; each is {} where it has none.

    Attributes:
      attention: by layer, how much weight its heads give to each distance.
      gates: by layer and gate, how much of the new it lets in.
      halting: by step, which positions take it.
    """

    attention: dict[str, ByDistance]
    gates: dict[str, Gate]
    halting: dict[str, Running]


_told: contextvars.ContextVar[list[Told] | None] = contextvars.ContextVar(
    "told", default=None
)
_at: contextvars.ContextVar[tuple[int, ...]] = contextvars.ContextVar("at", default=())


@contextlib.contextmanager
def watch() -> Iterator[list[Told]]:
    """Yields the list that what is told inside of it is put into."""
    found: list[Told] = []
    before = _told.set(found)
    try:
        yield found
    finally:
        _told.reset(before)


def watched() -> bool:
    """Whether somebody watches."""
    return _told.get() is not None


def tell(make: Callable[[], Any], name: str = "") -> None:
    """Tells what `make` gives, which is not called where nobody watches."""
    found = _told.get()
    if found is not None:
        found.append(Told(_at.get(), name, make()))


@contextlib.contextmanager
def inside(number: int) -> Iterator[None]:
    """What is told inside of it is of the layer of that number."""
    before = _at.set((*_at.get(), number))
    try:
        yield
    finally:
        _at.reset(before)


def by_distance(p_BHTS: jax.Array, mask, distance_TS) -> ByDistance:
    """Weights of pairs, collected by distance.

    Args:
      p_BHTS: the weights; what is masked does not count.
      mask: which pairs are visible; broadcasts to [B, 1, T, S].
      distance_TS: of each pair, or [B, 1, T, S]; below 0 is ahead, and counts as its
        absolute value.
    """
    B, H, T, S = p_BHTS.shape
    shape = (B, 1, T, S)
    mask, distance = (jnp.broadcast_to(x, shape) for x in (mask, distance_TS))
    # Of what is hidden nothing may be added, whatever its distance is.
    index_N = jnp.where(mask, abs(distance), S).reshape(-1)
    p_HN = jnp.moveaxis(p_BHTS, 1, 0).reshape(H, -1)
    zeros_HS = jnp.zeros((H, S), p_BHTS.dtype)
    return ByDistance(
        zeros_HS.at[:, index_N].add(p_HN, mode="drop"),
        zeros_HS[0].at[index_N].add(1, mode="drop"),
    )


def pairs(T: int, S: int) -> np.ndarray:
    """The distance of each query, of the last T of S positions, to each of these."""
    return np.arange(T)[:, None] + (S - T) - np.arange(S)[None]
