"""Optimizers for which parameters are matrices: Muon, and Adafactor.

A leaf may be many of them: in [L, D, 3, H, K] lie the queries, keys and values of L
layers, 3 L matrices [D, H K]. The model says which axes are the two sides of one
(Model.matrices); all others number them. Each is treated as a parameter of its own.
Left to itself optax gives stacked matrices to Adam, and in Adafactor takes the two
largest axes of a leaf for the sides of one matrix, and its norm over all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from xlformer.models.sides import Sides, is_stacked

# How large a number of an update of Muon is, as a root mean square: what it is in
# AdamW, so that one learning rate suits both (Liu et al. 2025, arXiv:2502.16982).
MUON_RMS = 0.2
# Adafactor's own, of its paper: exponent of the decay, a floor under squares, the
# largest root mean square of an update, the smallest of a parameter.
DECAY, FLOOR, LARGEST, SMALLEST = 0.8, 1e-30, 1.0, 1e-3
# Sides that are shorter save nothing, and lose most, by factors (as in optax).
FACTORED = 128


def muon(config, matrices: Callable) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for matrices, Adam for all else, as its author has it.

    Momentum of 0.95 with Nesterov's step, and 5 steps of Newton and Schulz. matrices:
    params -> a tree of Sides, or None for what is no matrix: embeddings, softmax,
    biases, norms.
    """
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)

    def parts(params):
        structure = jax.tree.structure(params)
        sides = structure.flatten_up_to(matrices(params))
        # Not optax.contrib.muon, whose Adam takes Nesterov's step too (optax 0.2.8).
        muon = optax.contrib.scale_by_muon(
            weight_dimension_numbers=structure.unflatten(
                optax.contrib.MuonDimensionNumbers(*x) if x else optax.MaskedNode()
                for x in sides
            )
        )
        labels = structure.unflatten("muon" if x else "adam" for x in sides)
        return structure, sides, optax.partition({"muon": muon, "adam": adam}, labels)

    def init_fn(params):
        return parts(params)[-1].init(params)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("Muon needs params in update(grads, state, params)")
        structure, sides, tx = parts(params)
        updates, state = tx.update(updates, state, params)
        leaves = zip(jax.tree.leaves(updates), sides, strict=True)
        # Singular values near 1 make a root mean square of 1 / sqrt(the longer side).
        scaled = (
            u * (MUON_RMS * math.sqrt(max(_sizes(u, x)))) if x else u for u, x in leaves
        )
        return structure.unflatten(scaled), state

    return optax.GradientTransformation(init_fn, update_fn)


def _sizes(leaf, sides: Sides) -> list[int]:
    """The lengths of the two sides of a leaf's matrices."""
    return [math.prod(leaf.shape[axis] for axis in side) for side in sides]


# Adafactor ----------------------------------------------------------------------------


class Factors(NamedTuple):
    """Means of a matrix's squared gradients over its outputs and over its inputs.

    Both keep all axes of the leaf, those that were averaged over with length 1.
    """

    row: Any
    column: Any


class AdafactorState(NamedTuple):
    """Attributes:
    count: updates so far.
    v: for each leaf its Factors, or the mean of its squared gradients.
    """

    count: jax.Array
    v: Any


def scale_by_adafactor(matrices: Callable) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018) without momentum; steps are as a parameter is.

    The learning rate is a share of the root mean square of each matrix. matrices: as of
    `muon`; of what is none, the last two axes within a layer are its sides.
    """

    def init_fn(params):
        structure, places = _places(params, matrices)
        v = [
            _zeros(p, at) for p, at in zip(jax.tree.leaves(params), places, strict=True)
        ]
        return AdafactorState(jnp.zeros((), jnp.int32), structure.unflatten(v))

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("Adafactor needs params in update(grads, state, params)")
        structure, places = _places(params, matrices)
        leaves = jax.tree.leaves(updates), structure.flatten_up_to(state.v)
        decay = 1 - (state.count + 1).astype(float) ** -DECAY
        found = [
            _updated(*leaf, decay)
            for leaf in zip(*leaves, jax.tree.leaves(params), places, strict=True)
        ]
        new, v = (structure.unflatten(part) for part in zip(*found, strict=True))
        return new, AdafactorState(state.count + 1, v)

    return optax.GradientTransformation(init_fn, update_fn)


class _Place(NamedTuple):
    """Of a leaf: the axes of one parameter, and its sides if it gets factors."""

    axes: tuple[int, ...]
    sides: Sides | None


def _places(params, matrices):
    structure = jax.tree.structure(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = structure.flatten_up_to(matrices(params))
    return structure, [_place(*leaf, x) for leaf, x in zip(leaves, found, strict=True)]


def _place(path, leaf, sides: Sides | None) -> _Place:
    axes = tuple(range(int(is_stacked(path)), leaf.ndim))
    if sides:
        axes = (*sides.inputs, *sides.outputs)
    elif len(axes) >= 2:
        sides = Sides(axes[-2:-1], axes[-1:])
    if not sides:
        return _Place(axes, None)
    return _Place(axes, sides if min(_sizes(leaf, sides)) >= FACTORED else None)


def _zeros(param, place: _Place):
    if place.sides is None:
        return jnp.zeros_like(param)
    return Factors(
        *(
            jnp.zeros(
                [1 if i in over else n for i, n in enumerate(param.shape)], param.dtype
            )
            for over in (place.sides.outputs, place.sides.inputs)
        )
    )


def _updated(grad, v, param, place: _Place, decay):
    """The update of one leaf, uphill, and its new squares."""

    def moved(old, new):
        return (decay * old + (1 - decay) * new).astype(old.dtype)

    squares = jnp.square(grad) + FLOOR
    if place.sides is None:
        v = moved(v, squares)
        update = grad * jax.lax.rsqrt(v)
    else:
        inputs, outputs = place.sides
        v = Factors(
            moved(v.row, squares.mean(outputs, keepdims=True)),
            moved(v.column, squares.mean(inputs, keepdims=True)),
        )
        # The squares of rank one with these means: row column / (mean of both).
        whole = v.row.mean(inputs, keepdims=True)
        update = grad * jax.lax.rsqrt(v.row / whole) * jax.lax.rsqrt(v.column)
    update = update / jnp.maximum(1, _rms(update, place.axes) / LARGEST)
    return update * jnp.maximum(_rms(param, place.axes), SMALLEST), v


def _rms(x, axes):
    return jnp.sqrt(jnp.square(x).mean(axes, keepdims=True))
