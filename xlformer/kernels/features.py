"""Feature maps of linear attention: phi(x) . phi(y) stands for a kernel of x and y.

A map gives its features as a logarithm and a factor, phi(x) = exp(log) f: the factor of
a softmax map is at most about 1, whatever the norm of x, and attention exponentiates
the logarithms only relative to each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from xlformer.errors import UserError, did_you_mean
from xlformer.kernels.products import product, wide


@dataclasses.dataclass(frozen=True)
class Map:
    """One feature map.

    Attributes:
      factor: (x, projection, epsilon) -> (log or None for 0, f).
      softmax: whether phi(x) . phi(y) estimates exp(x . y); they need rows.
      nonnegative: whether all features are, so that a sum of them cancels nothing.
      width: features per row of the projection.
      overflows: whether vectors that a model may well have give features that are not
        finite: exp(89) is none in float32. Those vectors then count as not finite.
    """

    factor: Callable
    softmax: bool
    nonnegative: bool
    width: int = 1
    overflows: bool = False


@dataclasses.dataclass(frozen=True)
class Features:
    """A map by its name, and what is added to every feature.

    Attributes:
      name: a key of FEATURES.
      epsilon: added to every feature: to f(x) of the generalised maps; to a softmax
        map's features relative to the largest of their position, before the division
        by the root of their number. It biases what a softmax map estimates.
    """

    name: str = "positive"
    epsilon: float = 0.0

    def __post_init__(self):
        if self.name not in FEATURES:
            near = did_you_mean(self.name, list(FEATURES))
            raise UserError(f"features={self.name!r}{near}")

    @property
    def map(self) -> Map:
        return FEATURES[self.name]

    def __call__(self, x: jax.Array, projection_MK: jax.Array | None):
        """The features of vectors x[..., K].

        Args:
          x: for a softmax map each of query and key divided by K^(1/4).
          projection_MK: random rows, taken as constants; the same for queries and keys.
            A softmax map needs one; a generalised one reads x itself where it is None.

        Returns:
          log [...], float32 at least, and f [..., M] in the dtype of x, M the rows of
          the projection (or K) times the map's width: phi(x) = exp(log) f.
        """
        log, f = self.factors(x, projection_MK)
        return jnp.zeros(x.shape[:-1], wide(x.dtype)) if log is None else log, f

    def factors(self, x: jax.Array, projection_MK: jax.Array | None):
        """As calling it, but log is None where it is 0 for every x."""
        if projection_MK is None and self.map.softmax:
            raise ValueError(f"features {self.name!r} need a projection")
        with jax.named_scope(f"features_{self.name}"):
            log, f = self.map.factor(x, projection_MK, self.epsilon)
            return log, f.astype(x.dtype)


def _project(x, projection_MK):
    """w . x of every row, in `wide`. The rows are rounded to the dtype of x.

    Queries and keys see the same rounded rows, so that this is another draw rather than
    an error.
    """
    if projection_MK is None:
        return x.astype(wide(x.dtype))
    rows_MK = lax.stop_gradient(projection_MK).astype(x.dtype)
    # Not as one matrix [N, K]: rows and heads that are split over different axes of a
    # mesh would be gathered for it.
    names = "BHST"[: x.ndim - 1]
    return product(f"{names}K,MK->{names}M", x, rows_MK)


def _half_square(x):
    """|x|^2 / 2."""
    return 0.5 * jnp.square(x.astype(wide(x.dtype))).sum(-1)


# The maxima below cancel in phi, so they are constants: autodiff would send nothing
# through them (with an epsilon it would, and the published forms differ in that).


def _positive(x, projection_MK, epsilon):
    """exp(w . x - |x|^2 / 2) / sqrt(m) (Choromanski et al. 2020, lemma 1)."""
    p = _project(x, projection_MK)
    most = lax.stop_gradient(p.max(-1))
    f = (jnp.exp(p - most[..., None]) + epsilon) * p.shape[-1] ** -0.5
    return most - _half_square(x), f


def _hyperbolic(x, projection_MK, epsilon):
    """exp(+-w . x - |x|^2 / 2) / sqrt(2 m) (the same lemma)."""
    p = _project(x, projection_MK)
    p = jnp.concatenate([p, -p], axis=-1)
    most = lax.stop_gradient(p.max(-1))
    f = (jnp.exp(p - most[..., None]) + epsilon) * p.shape[-1] ** -0.5
    return most - _half_square(x), f


def _trigonometric(x, projection_MK, epsilon):
    """exp(|x|^2 / 2) (cos, sin)(w . x) / sqrt(m): random Fourier features."""
    p = _project(x, projection_MK)
    f = jnp.concatenate([jnp.cos(p), jnp.sin(p)], axis=-1) + epsilon
    return _half_square(x), f * p.shape[-1] ** -0.5


def _generalised(function, *, nonnegative, overflows=False):
    """function(W x) or function(x), without any factor (as the original's JAX code)."""

    def factor(x, projection_MK, epsilon):
        return None, function(_project(x, projection_MK)) + epsilon

    return Map(factor, softmax=False, nonnegative=nonnegative, overflows=overflows)


_POSITIVE = Map(_positive, softmax=True, nonnegative=True)
FEATURES = {
    "positive": _POSITIVE,
    # SMREG: the same map, of rows that all have the norm sqrt(K).
    "regularised": _POSITIVE,
    "hyperbolic": Map(_hyperbolic, softmax=True, nonnegative=True, width=2),
    "trigonometric": Map(_trigonometric, softmax=True, nonnegative=False, width=2),
    "relu": _generalised(jax.nn.relu, nonnegative=True),
    "elu": _generalised(lambda x: jax.nn.elu(x) + 1, nonnegative=True),
    "exp": _generalised(jnp.exp, nonnegative=True, overflows=True),
    "square": _generalised(
        lambda x: jnp.square(jax.nn.relu(x)), nonnegative=True, overflows=True
    ),
    "sigmoid": _generalised(jax.nn.sigmoid, nonnegative=True),
    "identity": _generalised(lambda x: x, nonnegative=False),
    "tanh": _generalised(jnp.tanh, nonnegative=False),
    "gelu": _generalised(
        lambda x: jax.nn.gelu(x, approximate=False), nonnegative=False
    ),
    "cos": _generalised(jnp.cos, nonnegative=False),
    "sin": _generalised(jnp.sin, nonnegative=False),
}
