"""What the original programs' forms do that ours does not, and where both agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer.errors import UserError
from xlformer.kernels import published
from xlformer.kernels.features import Features
from xlformer.kernels.linear_attention import linear_attention
from xlformer.kernels.published import Original

B, T, H, K, V, M = 3, 7, 2, 5, 3, 11
RANDOM = np.random.default_rng(0)
Q, KEYS = RANDOM.normal(size=(2, B, T, H, K))
VALUES = RANDOM.normal(size=(B, T, H, V))
W = RANDOM.normal(size=(M, K))
WEIGHTS = RANDOM.normal(size=(B, T, H, V))
# A row with a reset, one that begins in what is carried, one of padding alone.
START = np.array([[-1, -1, -1, -1, 4, 4, 4], [-1] * T, [0] * T])
VALID = np.arange(T)[None] < np.array([[5], [T], [0]])


pytestmark = pytest.mark.usefixtures("float64")


attention = jax.jit(
    published.attention, static_argnames=("features_name", "original", "causal")
)


def theirs(k, original, name="positive", **options):
    return attention(Q, k, VALUES, name, W, original, **options)


@functools.partial(jax.jit, static_argnames=("name", "causal"))
def ours(k, name="positive", causal=True, **options):
    q, k = Q * K**-0.25, k * K**-0.25
    return linear_attention(q, k, VALUES, Features(name), W, causal=causal, **options)[
        0
    ]


def gradients(original, k=KEYS, **options):
    return jax.grad(lambda k: (theirs(k, original, **options) * WEIGHTS).sum())(k)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-4])
def test_the_last_key_moves_earlier_outputs_of_theirs_and_none_of_ours(epsilon):
    """So the published causal forms are not: their unit is the greatest of all keys."""
    other = KEYS.copy()
    other[:, -1] *= 6
    of_theirs, of_ours = (
        np.abs(attend(other) - attend(KEYS))[:, :-1].max()
        for attend in (lambda k: theirs(k, Original(feature_epsilon=epsilon)), ours)
    )
    assert of_theirs > 1e-3 and of_ours == 0
    none = Original(feature_epsilon=0.0)
    assert np.abs(theirs(other, none) - theirs(KEYS, none))[:, :-1].max() < 1e-12


@pytest.mark.parametrize(
    ("name", "causal"), [("positive", True), ("trigonometric", False)]
)
def test_without_epsilon_both_are_one(name, causal):
    original = Original(feature_epsilon=0.0)
    options = {"name": name, "causal": causal, "valid_BT": VALID}
    options["start_BT"] = START if causal else START[:, :1]
    expected, found = ours(KEYS, **options), theirs(KEYS, original, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    slopes = gradients(original, **options)
    assert np.isfinite(found).all() and np.isfinite(slopes).all()


def test_padding_is_not_there():
    """Rows with their padding, however great, are the shorter rows."""
    L, original = 5, Original(feature_epsilon=1e-2)
    valid_BT = np.broadcast_to(np.arange(T) < L, (B, T))
    alone = attention(Q[:, :L], KEYS[:, :L], VALUES[:, :L], "positive", W, original)
    great = KEYS.copy()
    great[:, L:] = 1e3
    for k in (KEYS, great):
        found = theirs(k, original, valid_BT=valid_BT)[:, :L]
        np.testing.assert_allclose(found, alone, rtol=1e-12)
        slopes = np.asarray(gradients(original, k, valid_BT=valid_BT))
        assert np.isfinite(slopes).all() and (slopes[:, L:] == 0).all()


def test_a_document_is_what_it_is_alone_in_its_row():
    """However great the keys of those before and after it are; so are its gradients."""
    original = Original(feature_epsilon=1e-2)
    start_BT = np.broadcast_to(np.array([0, 0, 0, 3, 3, 3, 6]), (B, T))
    great = KEYS * np.array([5, 5, 5, 1, 1, 1, 5])[:, None, None]
    whole = theirs(great, original, start_BT=start_BT)
    slopes = gradients(original, great, start_BT=start_BT)

    def alone(k, part):
        found = attention(Q[:, part], k, VALUES[:, part], "positive", W, original)
        return (found * WEIGHTS[:, part]).sum(), found

    for part in (slice(0, 3), slice(3, 6)):
        expected, found = jax.grad(alone, has_aux=True)(great[:, part], part)
        np.testing.assert_allclose(whole[:, part], found, rtol=1e-10)
        np.testing.assert_allclose(slopes[:, part], expected, atol=1e-10)


def test_in_older_versions_a_row_depends_on_its_batch_mates():
    other = KEYS.copy()
    other[1:] *= 3
    for stabiliser, depends in (("original", False), ("original_batch", True)):
        original = Original(stabiliser=stabiliser, feature_epsilon=1e-3)
        change = np.abs(theirs(other, original) - theirs(KEYS, original))[0].max()
        assert (change > 1e-4) == depends


def test_what_no_program_has_is_refused():
    with pytest.raises(UserError, match="stabiliser='runing'; known"):
        Original(stabiliser="runing")
    with pytest.raises(UserError, match="maxima='const', did you mean 'constant'?"):
        Original(maxima="const")
    with pytest.raises(UserError, match="no original program has .*'hyperbolic'"):
        published.attention(Q, KEYS, VALUES, "hyperbolic", W, Original())


def test_half_precision_is_summed_in_float32():
    half = [jnp.asarray(x, jnp.bfloat16) for x in (Q, KEYS, VALUES)]
    exact = [x.astype(jnp.float32) for x in half]
    found, expected = (
        attention(*arrays, "relu", None, Original(), causal=False)
        for arrays in (half, exact)
    )
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


def test_memory_is_linear_in_the_length():
    arrays = [jnp.zeros((1, 1200, 1, 4), jnp.float32) for _ in range(3)]

    def total(*arrays):
        return published.attention(*arrays, "relu", None, Original()).sum()

    step = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*arrays).compile()
    # Where every query met every key it would be 1,200 numbers a query.
    assert step.memory_analysis().temp_size_in_bytes < 1200 * 300 * 4
