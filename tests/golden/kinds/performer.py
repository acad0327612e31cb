"""Performer's attention: Google's JAX program, performer-pytorch, and formulas.

Both programs' forms are kernels.published; formulas are kernels.linear_attention. The
name of an array says what it is: TAG/{query,key}_features, TAG/MODE/out and
TAG/MODE/grad/{q,k,v}, where gradients are of sum(out * cotangent).
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from golden.comparison import GRADIENTS, VALUES, Comparison

from xlformer.errors import UserError
from xlformer.kernels import published
from xlformer.kernels.features import Features
from xlformer.kernels.linear_attention import linear_attention
from xlformer.kernels.published import Original
from xlformer.kernels.relative_attention import relative_attention
from xlformer.layers import favor

NAME = "performer"
INPUTS = ("q", "k", "v")
GIVEN = (*INPUTS, "cotangent", "projection")
MODES = ("bidirectional", "causal")
# How the gradients that an array holds went through the maxima.
MAXIMA = {"grad": "differentiated", "grad_max_constant": "constant"}
# Names that Google's program registers its functions under, and ours.
KERNELS = {
    "relu": "relu",
    "jshiftedelu": "elu",
    "jexp": "exp",
    "jidentity": "identity",
    "jrequ": "square",
    "jsigmoid": "sigmoid",
    "jtanh": "tanh",
    "jgelu": "gelu",
    "jcos": "cos",
    "jsin": "sin",
}
# The most that denominators which cancel may take of a number's precision.
MOST_LOST = 2.5e-3
SOFTMAX = {"softmax_positive": "positive", "softmax_trig": "trigonometric"}
# Random rows are drawn in float32, ours always, the programs' unless told otherwise.
ROWS = 1e-6


def matches(names, config):
    del config
    without_rows = any(n.startswith("generalised_") for n in names)
    return set(INPUTS) <= names and ("projection" in names or without_rows)


def compare(arrays, config, dtype):
    if "softmax_kernel" in arrays or "source" in config:
        return _formulas(arrays, dtype)
    if "causal_eps" in config:
        form = functools.partial(_lucidrains, config)
        return _compare(arrays, form, dtype, heads_first=True)
    form = functools.partial(_google, config)
    found = _compare(arrays, form, dtype, heads_first=False)
    kernel_epsilon = config["kernel_epsilon"]
    for name in (n for n in arrays if n.startswith("kernel_fn/")):
        kernel = Features(_kernel(name.split("/")[1]), kernel_epsilon)
        found.values[name] = kernel(jnp.asarray(arrays["q"]), None)[1]
    matrices = [n for n in arrays if n.startswith("matrices/")]
    properties = {name: _rows_error(name, arrays[name]) for name in matrices}
    return dataclasses.replace(
        found,
        properties=properties,
        tolerances=found.tolerances | dict.fromkeys(matrices, ROWS),
    )


# The programs -------------------------------------------------------------------------


def _google(config, tag, causal, maxima):
    """Of a tag: our features, whether they are projected, our options."""
    del causal
    tag, unnormalised = re.subn("_unnormalised$", "", tag)
    normalised = not unnormalised and config.get("renormalize_attention", True)
    if tag in SOFTMAX:
        delta = config["numerical_stabilizer"]
        return (
            SOFTMAX[tag],
            True,
            Original(
                feature_epsilon=delta,
                # Google's program for TensorFlow has none.
                renormaliser=config.get("renormaliser", delta),
                maxima=maxima,
                normalised=normalised,
            ),
        )
    kernel, projected = re.subn("_projected$", "", tag.removeprefix("generalised_"))
    epsilon = config["kernel_epsilon"]
    original = Original(feature_epsilon=epsilon, scaled=False, normalised=normalised)
    return _kernel(kernel), bool(projected), original


def _lucidrains(config, tag, causal, maxima):
    del maxima
    softmax = tag == "softmax"
    original = Original(
        feature_epsilon=config["eps" if softmax else "kernel_epsilon"],
        sum_epsilon=config["causal_eps"] if causal else 0.0,
        maxima="constant",
    )
    kernel = "positive" if softmax else _kernel(tag.removeprefix("generalised_"))
    return kernel, True, original


def _kernel(name):
    known = KERNELS | {theirs.removeprefix("j"): x for theirs, x in KERNELS.items()}
    if name not in known:
        raise UserError(f"a kernel function named {name!r} is not known")
    return known[name]


def _compare(arrays, form, dtype, *, heads_first):
    def turned(x):
        """[B, T, H, *] to the file's axes, and back."""
        return jnp.swapaxes(x, 1, 2) if heads_first and x.ndim else x

    names = {tuple(n.split("/")) for n in arrays if n.count("/")}
    names = {n for n in names if n[0] not in ("kernel_fn", "matrices")}
    q, k, v = (turned(jnp.asarray(arrays[n])) for n in INPUTS)
    if q.shape[1] != k.shape[1]:
        raise UserError(
            f"{q.shape[1]} queries and {k.shape[1]} keys: not of a sequence"
        )
    cotangent = turned(jnp.asarray(arrays.get("cotangent", 0.0)))
    values, gradients, tolerances, made = {}, {}, {}, {}
    for tag in sorted({n[0] for n in names}):
        kernel, projected, original = form(tag, False, "constant")
        rows_MK = arrays["projection"] if projected else None
        made[tag] = _features(
            q, k, features_name=kernel, projection_MK=rows_MK, original=original
        )
        for which, f_BTHM in zip(("query", "key"), made[tag], strict=True):
            # Heads come first in the features of both programs.
            values[f"{tag}/{which}_features"] = jnp.swapaxes(f_BTHM, 1, 2)
    # The output comes with a gradient, if there is one.
    forms = {(*n[:2], n[2] if n[2] in MAXIMA else "grad") for n in names if len(n) > 2}
    for tag, mode, grad in sorted(forms):
        kernel, projected, original = form(tag, mode == "causal", MAXIMA[grad])
        attend = functools.partial(
            published.attention,
            features_name=kernel,
            projection_MK=arrays["projection"] if projected else None,
            original=original,
            causal=mode == "causal",
        )
        y_BTHV, grads = _with_gradient(attend, cotangent, q, k, v)
        values[f"{tag}/{mode}/out"] = turned(y_BTHV)
        found = {f"{tag}/{mode}/{grad}/{n}": turned(g) for n, g in grads}
        gradients |= found
        lost = _lost(*made[tag], mode == "causal", dtype) if original.normalised else 0
        # One key has all the weight, one feature cancels: to nothing but rounding.
        zero = min(k.shape[1], made[tag][0].shape[-1]) == 1
        if zero or lost > VALUES[dtype] / 4:
            least = max(GRADIENTS[dtype] * (100 if zero else 1), 10 * lost)
            tolerances |= {f"{tag}/{mode}/out": max(VALUES[dtype], 4 * lost)}
            tolerances |= dict.fromkeys(found, least)
    return Comparison(values, gradients, GIVEN, tolerances=tolerances)


def _lost(q_BTHM, k_BTHM, causal, dtype):
    """What rounding makes of the worst denominator, relatively.

    Features of both signs cancel in it. No more than MOST_LOST: of what has cancelled
    to nothing no number can be compared.
    """
    q_BTHM, k_BTHM = (np.asarray(x, np.float64) for x in (q_BTHM, k_BTHM))
    sums_BHT = []
    for q, k in (q_BTHM, k_BTHM), (np.abs(q_BTHM), np.abs(k_BTHM)):
        weight_BHTS = np.einsum("BTHM,BSHM->BHTS", q, k)
        sums_BHT.append((np.tril(weight_BHTS) if causal else weight_BHTS).sum(-1))
    worst = np.max(sums_BHT[1] / np.abs(sums_BHT[0]))
    return min(worst * np.finfo(dtype).eps / 2, MOST_LOST)


_features = jax.jit(published.features, static_argnames=("features_name", "original"))


def _with_gradient(attend, cotangent, *inputs):
    def loss(*inputs):
        y = attend(*inputs)
        return (y * cotangent).sum(), y

    grads, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return y, zip(INPUTS, grads, strict=True)


def _rows_error(name, w_NMK):
    """How far random rows are from what they must be; infinity if ours are."""
    N, m, K = w_NMK.shape
    one_length = name.endswith("scaling1")
    features_name = favor.REGULARISED if one_length else "positive"

    def ours(draw):
        return favor.projection(0, 0, draw, features_name=features_name, m=m, K=K)

    ours_NMK = jax.jit(jax.vmap(ours))(jnp.arange(N))
    theirs, ours = (_defect(np.asarray(x), one_length) for x in (w_NMK, ours_NMK))
    # Ours are drawn in float32, whatever the file is compared in.
    return theirs if ours < ROWS else np.inf


def _defect(w_NMK, one_length):
    """Rows of a K x K block are orthogonal, with the length sqrt(K), or with lengths
    whose square is K on average."""
    N, m, K = w_NMK.shape
    square_NM = np.square(w_NMK, dtype=np.float64).sum(-1)
    unit_NMK = w_NMK / np.sqrt(square_NM)[..., None]
    error = np.abs(square_NM / K - 1).max() if one_length else 0.0
    for first in range(0, m, K):
        block_NRK = unit_NMK[:, first : first + K]
        between_NRR = block_NRK @ np.swapaxes(block_NRK, 1, 2)
        error = max(error, np.abs(between_NRR - np.eye(block_NRK.shape[1])).max())
    # A chi-squared number has the variance 2 K: five standard errors of their mean.
    mean_off = abs(square_NM.mean() / K - 1) > 5 * np.sqrt(2 / (K * N * m))
    return np.inf if mean_off else error


# Formulas -----------------------------------------------------------------------------


def _formulas(arrays, dtype):
    """Features, attention and the last sums, from formulas without any stabiliser."""
    q, k, v = (jnp.swapaxes(jnp.asarray(arrays[n]), 1, 2) for n in INPUTS)
    K, w_MK = q.shape[-1], jnp.asarray(arrays["projection"])
    x, y = q * K**-0.25, k * K**-0.25
    values = {"softmax_kernel": jnp.exp(jnp.einsum("BTHK,BSHK->BHTS", x, y))}
    tolerances = {}
    for mode in MODES:
        out = relative_attention(q * K**-0.5, None, k, v, None, causal=mode == "causal")
        values[f"exact/{mode}/out"] = jnp.swapaxes(out, 1, 2)
    for tag in ("positive", "hyperbolic", "trigonometric", "regularised"):
        found, by_position = jax.jit(functools.partial(_formula, tag))(x, y, v, w_MK)
        values |= {f"{tag}/{name}": value for name, value in found.items()}
        for mode in MODES:
            lost = _lost(*by_position, mode == "causal", dtype)
            if lost > VALUES[dtype] / 4:
                tolerances[f"{tag}/{mode}/out"] = 4 * lost
    return Comparison(values, given={*INPUTS, "projection"}, tolerances=tolerances)


def _formula(tag, x, y, v, w_MK):
    """What the file has of one map; and the features [B, T, H, M]."""
    features, found = Features(tag), {}
    if tag == favor.REGULARISED:
        w_MK = favor.unit(w_MK) * w_MK.shape[1] ** 0.5
    made = [
        jnp.exp(log)[..., None] * f for log, f in map(features, (x, y), (w_MK,) * 2)
    ]
    for which, f_BTHM in zip(("query", "key"), made, strict=True):
        found[f"{which}_features"] = jnp.swapaxes(f_BTHM, 1, 2)
    found["kernel"] = jnp.einsum("BTHM,BSHM->BHTS", *made)
    for mode in MODES:
        causal = mode == "causal"
        out, sums = linear_attention(x, y, v, features, w_MK, causal=causal)
        found[f"{mode}/out"] = jnp.swapaxes(out, 1, 2)
    unit = jnp.exp(sums.scale_BH)[..., None]
    found["causal/state_S"] = sums.values_BHMV * unit[..., None]
    found["causal/state_z"] = sums.keys_BHM * unit
    return found, made
