"""Losses of training alone (Al-Rfou et al. 2018): inner layers, the target after next.

Layer k of N, counted from 1, predicts too, with a classifier of its own, until k/(2N)
of the training; the last layer never stops. At each position the target after next is
predicted as well, with a second classifier and a weight. The losses of the layers are
added up; each is a mean over the positions of a row, then over rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xlformer.kernels.cross_entropy import softmax_nll
from xlformer.sharding import constrain

# Logical axes of the parameters, behind the one of the layers: see
# models.parameters.param_axes.
# Widths are whole: of a table that `fsdp` alone splits, as a vocabulary of an odd size
# is, XLA's partitioner aborted on a mesh with two other axes (jaxlib 0.10.2).
PARAM_AXES = {
    "auxiliary/next_table": (None, "vocab", None),
    "auxiliary/next_bias": (None, "vocab"),
    "auxiliary/second_table": (None, "vocab", None),
    "auxiliary/second_bias": (None, "vocab"),
}


class Classifier(NamedTuple):
    """A linear layer and a softmax, of one layer or stacked [L, ...]."""

    table_VD: Any
    bias_V: Any

    def nll(self, h_BTD, targets_BT):
        """-log p of each target, [B, T]."""
        B, T, D = h_BTD.shape
        # Gathered over fsdp as it is used: see adaptive.AdaptiveSoftmax.
        table_VD = constrain(self.table_VD, "vocab", None)
        arrays = h_BTD.reshape(B * T, D), table_VD, self.bias_V
        nll_N = softmax_nll(*arrays, targets_BT.reshape(-1))
        return nll_N.reshape(B, T)


class Targets(NamedTuple):
    """What is predicted at each position, and of which positions it is known.

    Attributes:
      next_BT, second_BT: the next token, and the one after it.
      next_counts_BT, second_counts_BT: where they count.
    """

    next_BT: Any
    second_BT: Any
    next_counts_BT: Any
    second_counts_BT: Any

    @classmethod
    def of(cls, targets_BT, lengths=None) -> Targets:
        """Those of a segment: its last position does not know the target after next.

        lengths: how many positions are no padding; None, a number or [B].
        """
        B, T = targets_BT.shape
        lengths_B = jnp.broadcast_to(T if lengths is None else lengths, (B,))
        index_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
        second_BT = jnp.roll(targets_BT, -1, axis=1)
        counts_BT = index_BT < lengths_B[:, None]
        return cls(targets_BT, second_BT, counts_BT, index_BT < lengths_B[:, None] - 1)


def ends(n_layer: int, steps: int) -> np.ndarray:
    """The step from which on each layer contributes no more, [L]; of the last, never.

    Layer k contributes while step / steps < k / (2 n_layer). A third-party program
    divides integers there, which makes it 0 for all layers at once. steps is that of
    the whole training; 0, where it is not known, ends nothing.
    """
    never = np.iinfo(np.int32).max
    # ceil(steps k / 2N) in whole numbers: the first step at which it does not hold.
    found = [-(-steps * k // (2 * n_layer)) for k in range(1, n_layer)]
    return np.array([*(found if steps else [never] * (n_layer - 1)), never], np.int32)


def active(n_layer: int, steps: int, step) -> jax.Array:
    """Which layers predict at a step of the training, [L]; None is its beginning."""
    return jnp.asarray(0 if step is None else step) < ends(n_layer, steps)


def loss(h_BTD, classifiers, targets: Targets, weights):
    """The weighted loss of one layer's outputs; what has the weight 0 costs nothing.

    Args:
      h_BTD: the layer's outputs.
      classifiers: of the next target and of the one after it.
      weights: two numbers, which may be traced.
    """
    pairs = (targets[0], targets[2]), (targets[1], targets[3])
    total = 0.0
    for classifier, pair, weight in zip(classifiers, pairs, weights, strict=True):
        if classifier is not None:
            total += weight * _mean_if(weight > 0, h_BTD, classifier, *pair)
    return total


def _mean_if(counts, h_BTD, classifier: Classifier, targets_BT, counts_BT):
    """The mean nll, or 0 where it does not count."""
    dtype = jnp.promote_types(h_BTD.dtype, jnp.float32)

    def mean(h_BTD, classifier):
        nll_BT = classifier.nll(h_BTD, targets_BT)
        return mean_over_rows(nll_BT, counts_BT).astype(dtype)

    # A branch of the program, and no product with 0: once its time is over a layer is
    # not classified, forward or backward.
    return lax.cond(counts, mean, lambda *_: jnp.zeros((), dtype), h_BTD, classifier)


def mean_over_rows(nll_BT: jax.Array, counts_BT) -> jax.Array:
    """Over the positions of a row that count, then over rows."""
    # Not a product with 0: what padding gives may be NaN.
    sum_B = jnp.where(counts_BT, nll_BT, 0).sum(1)
    return (sum_B / jnp.maximum(counts_BT.sum(1), 1)).mean()
