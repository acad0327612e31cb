"""What the tests of Transformer-XL share: small models, weights, tokens, scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from xlformer import models
from xlformer.models import TransformerXLConfig

V, D, TINY = 23, 8, 1e-9
FIELDS = dict(
    vocab_size=V,
    n_layer=2,
    d_model=D,
    n_head=2,
    d_inner=11,
    memory_length=13,
    dropout=0.0,
    scan_layers=True,
    norm_epsilon=1e-3,
)


@functools.cache
def build(**fields):
    return models.build(TransformerXLConfig(**FIELDS | fields))


@functools.cache
def weights(model, dtype="float64"):
    """Weights as large as those of testing.check_model, without compiling init."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(
        lambda x: (random.normal(size=x.shape) * x.size**-0.25).astype(dtype), shapes
    )


@functools.cache
def tokens(B, N):
    return np.random.default_rng(B).integers(V, size=(B, N))


@functools.cache
def apply(model):
    return jax.jit(model.apply, static_argnames=("train",))


def score(model, tokens_BN, sizes, *, params=None, state=None, **options):
    """nll of the stream cut into segments of these sizes."""
    params = weights(model) if params is None else params
    state = model.init_state(len(tokens_BN), jnp.float64) if state is None else state
    parts, start = [], 0
    for size in sizes:
        here = slice(start, start + size)
        arrays = tokens_BN[:, here], tokens_BN[:, here] * 5 % V
        nll_BT, state, _ = apply(model)(params, *arrays, state, **options)
        parts.append(nll_BT)
        start += size
    return np.concatenate(parts, axis=1), state


def close(actual, expected, tolerance=TINY):
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0)
