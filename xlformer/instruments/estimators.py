"""How far FAVOR+ is from softmax: by formula, and by draws of the features themselves.

Vectors x and y of one length l at an angle; SM = exp(x . y) is the softmax kernel, m
the rows of the projection, K the width (Choromanski et al. 2020, lemma 2, theorems 1
and 2). Features of `regularised` rows (SMREG) estimate another kernel, which is less.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from xlformer.kernels.features import Features
from xlformer.kernels.linear_attention import linear_attention
from xlformer.layers import favor

POSITIVE, TRIGONOMETRIC, HYPERBOLIC = "positive", "trigonometric", "hyperbolic"
FORMULAS = POSITIVE, TRIGONOMETRIC, HYPERBOLIC
MAPS = (*FORMULAS, favor.REGULARISED)


def kernel(angle, length):
    """SM of two vectors of this length."""
    return np.exp(length**2 * np.cos(angle))


def squared_error(name: str, angle, length, m: int):
    """E (phi(x) . phi(y) - SM)^2 of m independent Gaussian rows."""
    sm = kernel(angle, length)
    sum_, difference = (2 * length**2 * (1 + s * np.cos(angle)) for s in (1, -1))
    if name == TRIGONOMETRIC:
        return np.exp(sum_) / sm**2 * np.expm1(-difference) ** 2 / (2 * m)
    positive = np.exp(sum_) * sm**2 * -np.expm1(-sum_) / m
    return {POSITIVE: positive, HYPERBOLIC: positive * -np.expm1(-sum_) / 2}[name]


def ratio(angle, length):
    """The error of trigonometric features over that of positive ones, of equal m.

    Above 1 positive features are better; 0 at an angle of 0, where trigonometric ones
    do not err, and infinite at pi, where positive ones do not.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        both = (squared_error(name, angle, length, 1) for name in FORMULAS[:2])
        positive, trigonometric = both
        return trigonometric / positive


def least_angle(length: float) -> float:
    """From which angle on positive features are better, by bisection."""
    low, high = 0.0, np.pi
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if ratio(middle, length) > 1 else (middle, high)
    return high


def orthogonal_bound(angle, length, m: int, K: int):
    """The most that orthogonal rows of positive features can err, m <= K."""
    less = kernel(angle, length) - np.exp(-(length**2))
    gain = 2 * (m - 1) / (m * (K + 2)) * less**2
    return squared_error(POSITIVE, angle, length, m) - gain


def spread(name: str, angle, length, m: int, draws: int):
    """About the relative standard error of a sampled squared error.

    A positive feature is log-normal with variance |x + y|^2, of whose square few draws
    know the mean; cosines are bounded.
    """
    sum_ = 2 * length**2 * (1 + np.cos(angle))
    heavy = np.exp(4 * sum_) / m if name != TRIGONOMETRIC else 0.0
    return np.sqrt((3 + heavy) / draws)


# Drawn --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which projections are drawn.

    Attributes:
      name: of the features.
      orthogonal: in blocks of K.
      m, K: of each.
    """

    name: str
    orthogonal: bool
    m: int
    K: int

    def draw(self, number) -> jax.Array:
        return favor.projection(
            0,
            0,
            number,
            features_name=self.name,
            m=self.m,
            K=self.K,
            orthogonal=self.orthogonal,
        )


@functools.partial(jax.jit, static_argnums=(0, 3))
def _estimates(rows: Rows, x_PK, y_PK, draws: int):
    """phi(x) . phi(y) of each draw and pair, [N, P]."""

    def one(number):
        w_MK, features = rows.draw(number), Features(rows.name)
        (x_log_P, x_PM), (y_log_P, y_PM) = (features(x, w_MK) for x in (x_PK, y_PK))
        return jnp.exp(x_log_P + y_log_P) * (x_PM * y_PM).sum(-1)

    return jax.lax.map(one, jnp.arange(draws))


def sampled(rows: Rows, angles, lengths, draws: int) -> dict[str, np.ndarray]:
    """Of pairs of vectors, the mean estimate, its squared error, and standard errors.

    Args:
      angles, lengths: of each pair, [P].
    """
    angle_P, length_P = (np.asarray(x, np.float64) for x in (angles, lengths))
    x_PK, y_PK = np.zeros((2, len(angle_P), rows.K), np.float32)
    x_PK[:, 0] = length_P
    y_PK[:, 0], y_PK[:, 1] = length_P * np.cos(angle_P), length_P * np.sin(angle_P)
    found_NP = np.asarray(_estimates(rows, x_PK, y_PK, draws), np.float64)
    square_NP = (found_NP - kernel(angle_P, length_P)) ** 2
    root = draws**0.5
    return {
        "mean": found_NP.mean(0),
        "mean_se": found_NP.std(0) / root,
        "squared_error": square_NP.mean(0),
        "squared_error_se": square_NP.std(0) / root,
    }


@functools.partial(jax.jit, static_argnums=0)
def _attention_error(name: str, q_BTHK, k_BTHK, v_BTHK, w_MK):
    y_BTHK, _ = linear_attention(q_BTHK, k_BTHK, v_BTHK, Features(name), w_MK)
    exact_BTHK = exact_attention(q_BTHK, k_BTHK, v_BTHK)
    return jnp.sqrt(jnp.square(y_BTHK - exact_BTHK).mean())


def exact_attention(q_BTHK, k_BTHK, v_BTHK):
    """Causal softmax attention of queries and keys as FAVOR takes them."""
    score_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BTHK)
    sees_TS = jnp.tril(jnp.ones(score_BHTS.shape[2:], bool))
    score_BHTS = jnp.where(sees_TS[None, None], score_BHTS, -jnp.inf)
    weight_BHTS = jax.nn.softmax(score_BHTS)
    return jnp.einsum("BHTS,BSHK->BTHK", weight_BHTS, v_BTHK)


def attention_errors(
    rows: Rows, scale: float, length: int, counts, draws: int
) -> np.ndarray:
    """RMS errors of causal attention, [draws, counts]; values are N(0, 1).

    Args:
      rows: as many as the most of `counts`; of fewer there are the first.
      scale: queries and keys are that times N(0, I), divided by K^(1/4) each.
      counts: of rows.
    """
    random = np.random.default_rng(0)
    shape = 3, 1, length, 1, rows.K
    q_BTHK, k_BTHK, v_BTHK = random.normal(size=shape).astype(np.float32)
    q_BTHK, k_BTHK = (np.float32(scale / rows.K**0.25) * x for x in (q_BTHK, k_BTHK))
    draw = jax.jit(rows.draw)
    found = []
    for number in range(draws):
        w_MK = np.asarray(draw(number))
        # Rows that are repeated change no estimate, and all counts are one program.
        of_count = [w_MK[np.arange(rows.m) % m] for m in counts]
        found.append(
            [_attention_error(rows.name, q_BTHK, k_BTHK, v_BTHK, w) for w in of_count]
        )
    return np.asarray(found, np.float64)
