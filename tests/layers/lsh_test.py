"""Attention by hashing: one query at a time, and what holds of all of it."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import check

from xlformer.layers import lsh
from xlformer.layers.lsh import SELF, UNIT, UNIT_SCALED, Lsh

GOLDEN = pathlib.Path(check.__file__).parent
B, H, K, V = 3, 2, 5, 3


def tokens(T, seed=0, rounds=2, N=3, B=B):
    """qk_BTHK, v_BTHV and rotations_BHKRN."""
    random = np.random.default_rng(seed)
    shapes = (B, T, H, K), (B, T, H, V), (B, H, K, rounds, N)
    return tuple(random.normal(size=shape) for shape in shapes)


def rings(bucket_RT, tokens, form):
    """The chunks of a row's tokens, as lists of (round, token), and their shifts."""
    C, shifts = form.chunk_length, range(-form.before, form.after + 1)
    if len(tokens) <= C:
        return [[(0, t) for t in tokens]], [0]
    ring = [
        (r, t)
        for r, bucket_T in enumerate(bucket_RT)
        for t in sorted(tokens, key=lambda t: (bucket_T[t], t))
    ]
    chunks = [ring[i : i + C] for i in range(0, len(ring), C)]
    return chunks, [s if abs(s) < len(chunks) else 0 for s in shifts]


def naive(qk_TK, v_TV, bucket_RT, form, valid_T=None):
    """One softmax of a query over all it meets; complex numbers pass through it."""
    T, width = qk_TK.shape
    present = [t for t in range(T) if valid_T is None or valid_T[t]]
    chunks, shifts = rings(bucket_RT, present, form)
    few = len(chunks) == 1
    chunk_of = {pair: c for c, chunk in enumerate(chunks) for pair in chunk}
    squares = (qk_TK**2).sum(-1)
    if form.scaling == UNIT:
        unit_TK = qk_TK / np.sqrt(squares + 1e-6 * width)[:, None]
    else:
        unit_TK = qk_TK / np.sqrt(squares * width)[:, None]

    def meetings(query, key):
        found = 0
        for r in range(len(bucket_RT)):
            a, b = (chunk_of[r, t] for t in (query, key))
            hit = not form.same_bucket_only or bucket_RT[r][query] == bucket_RT[r][key]
            found += sum(hit and (a + s) % len(chunks) == b for s in shifts)
        return found

    y_TV = np.zeros(v_TV.shape, v_TV.dtype)
    for t in present:
        scores, values = [], []
        for (r, query), c in chunk_of.items():
            if query != t:
                continue
            for s in shifts:
                for r2, key in chunks[(c + s) % len(chunks)]:
                    score = qk_TK[t] @ unit_TK[key]
                    if form.discount_duplicates and not few:
                        score = score - np.log(meetings(t, key) + 1e-9)
                    other = (r, bucket_RT[r][t]) != (r2, bucket_RT[r2][key])
                    if key == t:
                        score = SELF[form.scaling]
                    elif form.causal and key > t:
                        continue
                    elif form.same_bucket_only and other and not few:
                        continue
                    scores.append(score)
                    values.append(v_TV[key])
        scores = np.array(scores)
        weights = np.exp(scores - scores.real.max())
        y_TV[t] = weights @ np.array(values) / weights.sum()
    return y_TV


def naive_rows(qk_BTHK, v_BTHV, bucket_BHRT, form, valid_BT=None):
    y_BTHV = np.zeros(v_BTHV.shape, np.result_type(qk_BTHK, v_BTHV))
    for b in range(len(y_BTHV)):
        valid_T = None if valid_BT is None else valid_BT[b]
        for h in range(y_BTHV.shape[2]):
            y_BTHV[b, :, h] = naive(
                qk_BTHK[b, :, h], v_BTHV[b, :, h], bucket_BHRT[b, h], form, valid_T
            )
    return y_BTHV


@functools.partial(jax.jit, static_argnames=("form", "buckets"))
def graded(qk, v, rotations, cotangent, form, buckets=None, valid=None):
    """The output, the gradients of its sum by cotangent, and the buckets."""

    def loss(qk, v):
        y = lsh.lsh_attention(qk, v, rotations, form, buckets=buckets, valid_BT=valid)
        return (y * cotangent).sum(), y

    grads, y = jax.grad(loss, (0, 1), has_aux=True)(qk, v)
    return y, grads, lsh.hashed(qk, rotations, buckets)


def agrees(T, form, *, rounds=2, buckets=None, valid=None, seed=0, N=3):
    """With the naive form: all values, and the gradients in a random direction."""
    qk, v, rotations = tokens(T, seed, rounds, N)
    random = np.random.default_rng(seed + 1)
    cotangent, *direction = (random.normal(size=x.shape) for x in (v, qk, v))
    real = np.ones((B, T), bool) if valid is None else valid
    real = real[:, :, None, None]
    given = [np.where(real, x, np.nan) for x in (qk, v)]
    with jax.enable_x64(True):
        y, grads, bucket = graded(
            *given, rotations, cotangent * real, form, buckets, valid
        )
    step = [x + 1e-30j * d for x, d in zip((qk, v), direction, strict=True)]
    expected = naive_rows(*step, np.asarray(bucket), form, valid)
    real_y = np.where(real, y, 0)
    np.testing.assert_allclose(real_y, expected.real, rtol=0, atol=1e-13)
    slope = sum(np.vdot(g, d) for g, d in zip(grads, direction, strict=True))
    expected_slope = (expected.imag * 1e30 * cotangent * real).sum()
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "arrays"),
    [("", 19), ("_options", 39), ("_masked", 9), ("_options_masked", 8)],
)
def test_equals_hugging_faces_layer_and_reformer_pytorch(name, arrays):
    result = check.check(GOLDEN / f"reformer_lsh{name}.npz")
    assert result.ok, result.problems
    assert result.compared == result.total == arrays
    if name == "_masked":
        result = check.check(GOLDEN / f"reformer_lsh{name}.npz", float32=True)
        assert result.ok, result.problems


T = 23
SOME = np.array([[True] * T, [t < 5 for t in range(T)], [t % 3 > 0 for t in range(T)]])
NONE_OR_FEW = np.arange(7)[None] < np.array([[7], [0], [3]])


@pytest.mark.parametrize(
    ("T", "form", "options"),
    [
        (T, Lsh(4), dict(rounds=3)),
        (T, Lsh(5, causal=False, after=1, scaling=UNIT_SCALED), dict(valid=SOME)),
        (
            T,
            Lsh(5, before=2, same_bucket_only=True, discount_duplicates=True),
            dict(rounds=3, valid=SOME),
        ),
        (
            T - 5,
            Lsh(12, before=4, scaling=UNIT_SCALED, discount_duplicates=True),
            dict(buckets=(2, 4)),
        ),
        (7, Lsh(7, before=2), dict(valid=NONE_OR_FEW)),
    ],
    ids=["plain", "padding", "same bucket", "discount", "short"],
)
def test_it_is_one_softmax_over_what_a_query_meets(T, form, options):
    """A row of padding is as if it were not there, and NaN in it spoils nothing."""
    agrees(T, form, **options)


def test_tokens_that_are_equal_or_nothing_keep_their_order():
    qk, v, rotations = tokens(T)
    qk[:, 3:15], qk[:, 17:] = qk[:, 3, None], 0
    for scaling in UNIT, UNIT_SCALED:
        form = Lsh(4, scaling=scaling)
        with jax.enable_x64(True):
            y, grads, bucket = graded(qk, v, rotations, v, form)
        assert all(np.isfinite(x).all() for x in (y, *grads))
        # A vector of zeros has the naive key 0/0, whose scores are 0 here.
        tiny = np.where(qk == 0, 1e-300 if scaling == UNIT else 1e-30, qk)
        expected = naive_rows(tiny, v, np.asarray(bucket), form)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-13)


attention = jax.jit(lsh.lsh_attention, static_argnames=("lsh",))


def test_where_all_chunks_see_each_other_it_is_full_attention():
    qk, v, rotations = tokens(T, rounds=1)
    full = attention(qk, v, rotations, lsh=Lsh(T))
    halves = attention(qk, v, rotations, lsh=Lsh(12))
    np.testing.assert_allclose(full, halves, rtol=0, atol=2e-6)


def test_more_rounds_are_closer_to_full_attention():
    qk, v, rotations = (3 * x for x in tokens(96, rounds=16, N=6))
    full = attention(qk, v, rotations, lsh=Lsh(96, causal=False))
    errors = []
    for rounds in 1, 4, 16:
        some = rotations[:, :, :, :rounds]
        y = attention(qk, v, some, lsh=Lsh(8, causal=False))
        errors.append(float(jnp.abs(y - full).mean()))
    assert errors[2] < 0.75 * errors[1] < 0.75**2 * errors[0]


def change_before(form, change, rounds=2, T=64, at=40):
    """How much outputs before `at` change with tokens from there on."""
    qk, v, rotations = tokens(T, rounds=rounds, N=4)
    later = (np.arange(T) >= at)[None, :, None, None]
    other = [np.where(later, y, x) for x, y in zip((qk, v), change(qk, v), strict=True)]
    found = [attention(*x, rotations, lsh=form)[:, :at] for x in ((qk, v), other)]
    return np.abs(found[0] - found[1]).max()


def test_what_is_causal():
    def in_their_buckets(qk, v):
        return 2 * qk, v - 1

    def into_other_buckets(qk, v):
        return -qk, v

    form = Lsh(8)
    assert change_before(form, in_their_buckets) == 0
    open_form = dataclasses.replace(form, causal=False)
    assert change_before(open_form, in_their_buckets) > 0.1
    # What the docstring warns of.
    assert change_before(form, into_other_buckets) > 0.1
    # Two chunks see each other, only in another order.
    assert change_before(Lsh(32), into_other_buckets, rounds=1) < 2e-6
    assert change_before(Lsh(64), into_other_buckets) == 0


def test_no_gradient_flows_back_from_later_tokens():
    qk, v, rotations = tokens(T)
    cotangent = np.where(np.arange(T)[None, :, None, None] == 13, 1.0, 0)
    _, grads, _ = graded(qk, v, rotations, cotangent, Lsh(4))
    for grad in grads:
        assert np.asarray(grad[:, :13]).any() and not np.asarray(grad[:, 14:]).any()


def test_rotations_are_of_the_rows_key_alone_in_any_precision():
    keys_B = jax.random.split(jax.random.key(3), 3)
    draw = functools.partial(lsh.rotations, H=2, K=5, rounds=2, buckets=(4, 6))
    all_rows = draw(keys_B, dtype=jnp.float32)
    assert all_rows.shape == (3, 2, 5, 2, 5)
    np.testing.assert_array_equal(draw(keys_B[1:2], dtype=jnp.float32)[0], all_rows[1])
    words_B2 = jax.random.key_data(keys_B)
    np.testing.assert_array_equal(draw(words_B2, dtype=jnp.float32), all_rows)
    with jax.enable_x64(True):
        double = draw(keys_B, dtype=jnp.float64)
    assert double.dtype == np.float64
    np.testing.assert_array_equal(double.astype(np.float32), all_rows)
    values = np.asarray(draw(jax.random.split(keys_B[0], 40), dtype=jnp.float32))
    assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05


def arrays(jaxpr):
    """Everything that is computed on the way."""
    for equation in jaxpr.eqns:
        yield from (x.aval for x in equation.outvars)
        for part in jax.tree.leaves(list(equation.params.values())):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield from arrays(part)


def test_no_array_grows_faster_than_the_length():
    def largest(T):
        qk, v, rotations = tokens(T, B=1)
        form = Lsh(8, same_bucket_only=True, discount_duplicates=True)
        valid = np.ones((1, T), bool)
        trace = jax.make_jaxpr(functools.partial(graded.__wrapped__, form=form))
        jaxpr = trace(qk, v, rotations, v, valid=valid).jaxpr
        return max(x.size for x in arrays(jaxpr))

    assert largest(512) <= 4 * largest(128)
