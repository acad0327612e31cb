"""Layers that are alike, one after the other: compiled once and looped, or unrolled."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from xlformer.kernels import watching
from xlformer.kernels.call import OUTPUT_NAME

REMAT = ("none", "attention", "full")


def run(layer: Callable, carry, stacked, *, scan: bool, remat: str = "none"):
    """lax.scan of layer(carry, part) -> (carry, kept) over the layers.

    Args:
      layer: one layer.
      carry: what goes from layer to layer.
      stacked: arrays [L, ...], of which each layer gets its part.
      scan: a loop, which compiles in the time of one layer; else unrolled, which runs a
        little faster and lets the compiler treat each layer by itself.
      remat: what the backward pass computes again of a layer: nothing, all but the
        output of attention, or everything.

    Returns:
      The last carry, and what the layers kept, stacked.
    """
    if watching.watched():
        scan, remat = False, "none"
    # Measured on a prototype with the compiler of a v5e (12 layers of d_model 512, 4
    # rows, T = M = 512): unrolled 70 s to compile, scanned 16 s, with full remat 21 s;
    # temporaries of 1,358, 1,969 and 287 MiB. On a CPU, 8 layers of width 256 took 1.25
    # times as long to run when scanned, and 1.30 times with full remat.
    if remat != "none":
        # The output of attention is small beside the scores that lead to it. Keeping it
        # spares the backward pass from running attention a second time.
        policy = jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME)
        policy = policy if remat == "attention" else None
        layer = jax.checkpoint(layer, policy=policy)
    if scan:
        return lax.scan(layer, carry, stacked)
    # Not scan(unroll=...): its body is one function that each layer calls, in which
    # XLA's partitioner (jax 0.10.2, TPU) loses that `data` is split.
    kept = []
    for number, part in enumerate(_parts(stacked)):
        with watching.inside(number):
            carry, one = layer(carry, part)
        kept.append(one)
    return carry, jax.tree.map(lambda *layers: jnp.stack(layers), *kept)


def _parts(stacked) -> list:
    """One tree a layer, of a tree of stacked arrays.

    The gradient of a split is one concatenation; that of an index for each layer is a
    sum of as many arrays of the whole size.
    """
    leaves, structure = jax.tree.flatten(stacked)
    n_layer = leaves[0].shape[0]
    split = [lax.split(leaf, [1] * n_layer) for leaf in leaves]
    return [structure.unflatten([x[i][0] for x in split]) for i in range(n_layer)]
