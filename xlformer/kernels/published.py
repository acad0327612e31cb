"""Linear attention as the original programs stabilise it, to agree with their weights.

Google's fast_attention.py (JAX) and performer-pytorch subtract from a key's exponents
the greatest one of ALL keys, and add an epsilon to every feature after that. So

- outputs depend on keys that come after them, also where they are causal: at unit
  norms another last key moves earlier outputs by up to 0.2 with an epsilon of 1e-6, 0.6
  with 1e-4. With 0 it moves none, but keys far below the greatest then vanish;
- an epsilon is a bias, relative to the largest feature anywhere in the sequence;
- sums cannot be carried from a segment to the next: their unit is not known before it.

`linear_attention.linear_attention` has none of this. What the programs are:

                    Google, JAX         performer-pytorch     Google, TensorFlow
    feature_epsilon 1e-6                1e-4                  1e-6
      generalised   1e-3                1e-3                  1e-3
    maxima          differentiated      constant since 2022   differentiated
    renormaliser    feature_epsilon     0                     0
      generalised   0                   0                     0
    sum_epsilon     0                   1e-6 where causal     0
    scaled          softmax features    all features          softmax features

The last one also divides projected generalised features by the root of their number
before their function: hand it such a projection.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from xlformer.errors import UserError, did_you_mean
from xlformer.kernels.features import FEATURES, Features, wide
from xlformer.kernels.linear_attention import from_features

STABILISERS = ("original", "original_batch")
ROW = (1, 3)  # positions and features, of a row and head
MAXIMA = ("differentiated", "constant")
# Softmax features that a program has; the generalised ones have no maxima.
SOFTMAX = ("positive", "regularised", "trigonometric")


@dataclasses.dataclass(frozen=True)
class Original:
    """How an original program computes linear attention; see the module for which does.

    Attributes:
      stabiliser: of what the greatest exponent of keys is taken: 'original' in each row
        and head, 'original_batch' over all rows and heads too, where positive (Google's
        fast_self_attention.py and performer-pytorch until October 2021, in which a row
        depends on its batch mates).
      feature_epsilon: added to positive and generalised features, not to trigonometric.
      renormaliser: delta; a denominator D with |D| <= delta is taken for D + 2 delta.
      sum_epsilon: added to every entry of the summed keys.
      maxima: whether gradients pass through the greatest exponents, or those are
        constants. Without epsilon it makes no difference.
      scaled: whether queries and keys are divided by K^(1/4).
      normalised: whether outputs are divided by the sum of their weights.
    """

    stabiliser: str = "original"
    feature_epsilon: float = 1e-6
    renormaliser: float = 0.0
    sum_epsilon: float = 0.0
    maxima: str = "differentiated"
    scaled: bool = True
    normalised: bool = True

    def __post_init__(self):
        for name, known in (("stabiliser", STABILISERS), ("maxima", MAXIMA)):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name}={value!r}{did_you_mean(value, list(known))}")


def attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    features_name: str,
    projection_MK: jax.Array | None,
    original: Original,
    *,
    start_BT: jax.Array | None = None,
    valid_BT: jax.Array | None = None,
    causal: bool = True,
) -> jax.Array:
    """Attention of an original program, y [B, T, H, V] in the dtype of v.

    Causal only in that no later value is read: see the module. What sees no key is 0.

    Args:
      q_BTHK, k_BTHK, v_BTHV: neither scaled nor divided.
      features_name: of FEATURES; 'hyperbolic' is in neither program.
      projection_MK: rows of random features, or None for generalised ones without.
      start_BT: the first key that each query sees, never decreasing in t; [B, 1] where
        causal is False. Where True, keys of one start have a greatest of their own.
      valid_BT: which keys count; the others' features are 0, and no maximum is theirs.
    """
    q_BTHM, k_BTHM = features(
        q_BTHK,
        k_BTHK,
        features_name,
        projection_MK,
        original,
        start_BT=start_BT if causal else None,
        valid_BT=valid_BT,
    )
    # The sum of the weights is one more value, which is 1 at every key.
    values_BTHV = v_BTHV.astype(wide(v_BTHV.dtype))
    values_BTHV = jnp.pad(values_BTHV, ((0, 0),) * 3 + ((0, 1),), constant_values=1)
    summed_BTHV, _ = from_features(
        q_BTHM,
        None,
        k_BTHM,
        values_BTHV,
        start_BT=start_BT,
        valid_BT=valid_BT,
        causal=causal,
        normalise=False,
    )
    y_BTHV, sum_BTH1 = summed_BTHV[..., :-1], summed_BTHV[..., -1:]
    if original.normalised:
        delta = original.renormaliser
        sum_BTH1 += original.sum_epsilon * q_BTHM.sum(-1, keepdims=True)
        sum_BTH1 += 2 * delta * (jnp.abs(sum_BTH1) <= delta)
        # 0 / 0 in the programs: padding that sees nothing, whose NaN would spread.
        there = sum_BTH1 != 0
        y_BTHV = jnp.where(there, y_BTHV / jnp.where(there, sum_BTH1, 1), 0)
    return y_BTHV.astype(v_BTHV.dtype)


def features(
    q_BTHK,
    k_BTHK,
    features_name,
    projection_MK,
    original: Original,
    *,
    start_BT=None,
    valid_BT=None,
):
    """Features of queries and of keys, [B, T, H, M], in float32 at least."""
    if FEATURES[features_name].softmax and features_name not in SOFTMAX:
        raise UserError(f"no original program has features={features_name!r}")
    dtype = wide(q_BTHK.dtype)
    scale = q_BTHK.shape[-1] ** -0.25 if original.scaled else 1.0
    q_BTHK, k_BTHK = (x.astype(dtype) * scale for x in (q_BTHK, k_BTHK))
    if not FEATURES[features_name].softmax:
        generalised = Features(features_name, original.feature_epsilon)
        q_BTHM, k_BTHM = (generalised(x, projection_MK)[1] for x in (q_BTHK, k_BTHK))
    else:
        make = _trigonometric if features_name == "trigonometric" else _positive
        w_MK = lax.stop_gradient(projection_MK).astype(dtype)
        q_BTHM = make(q_BTHK, w_MK, original, None, None, is_query=True)
        k_BTHM = make(k_BTHK, w_MK, original, start_BT, valid_BT, is_query=False)
    if valid_BT is not None:
        k_BTHM = jnp.where(valid_BT[..., None, None], k_BTHM, 0)
    return q_BTHM, k_BTHM


def _positive(x_BTHK, w_MK, original, start_BT, valid_BT, *, is_query):
    """(exp(w . x - |x|^2 / 2 - greatest w . x) + epsilon) / sqrt(m)."""
    p_BTHM = jnp.einsum("BTHK,MK->BTHM", x_BTHK, w_MK)
    # Of a query there is one for each position, which cancels but for the epsilon.
    axes = (-1,) if is_query else ROW
    if not is_query and original.stabiliser == "original_batch":
        axes = (0, 1, 2, 3)
    most = _greatest(p_BTHM, axes, start_BT, valid_BT, original)
    f_BTHM = _exp(p_BTHM - _half_square(x_BTHK) - most, valid_BT)
    return (f_BTHM + original.feature_epsilon) * w_MK.shape[0] ** -0.5


def _trigonometric(x_BTHK, w_MK, original, start_BT, valid_BT, *, is_query):
    """exp(|x|^2 / 2 - the greatest of a sequence) (cos, sin)(w . x) / sqrt(m)."""
    p_BTHM = jnp.einsum("BTHK,MK->BTHM", x_BTHK, w_MK)
    half_BTH1 = _half_square(x_BTHK)
    most = _greatest(half_BTH1, ROW, start_BT, valid_BT, original)
    f_BTHM = jnp.concatenate([jnp.cos(p_BTHM), jnp.sin(p_BTHM)], -1)
    return f_BTHM * _exp(half_BTH1 - most, valid_BT) * w_MK.shape[0] ** -0.5


def _greatest(x_BTHM, axes, start_BT, valid_BT, original):
    if valid_BT is not None:
        x_BTHM = jnp.where(valid_BT[..., None, None], x_BTHM, -jnp.inf)
    if start_BT is not None and axes == ROW:
        # The programs know no documents: each has here what it has alone in its row.
        most = _of_document(x_BTHM.max(-1, keepdims=True), start_BT)
    else:
        most = x_BTHM.max(axes, keepdims=True)
    return lax.stop_gradient(most) if original.maxima == "constant" else most


def _of_document(x_BTH1, start_BT):
    """The greatest of those positions that begin to see where each one does."""
    start_BT11 = jnp.broadcast_to(start_BT[..., None, None], x_BTH1.shape)

    def joined(one, other):
        (x, start), (y, later) = one, other
        return jnp.where(start == later, jnp.maximum(x, y), y), later

    # From both ends: what comes before it, and what comes after.
    both = (
        lax.associative_scan(joined, (x_BTH1, start_BT11), reverse=reverse, axis=1)[0]
        for reverse in (False, True)
    )
    return jnp.maximum(*both)


def _exp(x_BTHM, valid_BT):
    if valid_BT is not None:
        # What does not count may lie far above the greatest of what does.
        x_BTHM = jnp.where(valid_BT[..., None, None], x_BTHM, 0)
    return jnp.exp(x_BTHM)


def _half_square(x_BTHK):
    return 0.5 * jnp.square(x_BTHK).sum(-1, keepdims=True)
