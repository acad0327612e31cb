"""The error of FAVOR+: formulas against vectors, draws against formulas."""

import json

import numpy as np
import pytest

from xlformer import compare
from xlformer.instruments import estimators
from xlformer.instruments.estimators import Rows

M, K = 5, 7
PAIRS = [(0.3, 0.4), (1.9, 1.3), (2.8, 0.9)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What the smallest form wrote."""
    out = tmp_path_factory.mktemp("features")
    assert compare.main(["features:tiny", f"--out={out}", "--draws=1000"]) == 0
    assert "<svg" in (out / "features.svg").read_text()
    return json.loads((out / "features.json").read_text())


def vectors(angle, length):
    """Two of them, in a plane of no axis."""
    a, b = np.linalg.qr(np.random.default_rng(1).normal(size=(K, 2)))[0].T
    return length * a, length * (np.cos(angle) * a + np.sin(angle) * b)


@pytest.mark.parametrize("pair", PAIRS)
def test_formulas_are_those_of_vectors(pair):
    """Lemma 2 and theorem 1 of the paper, of any x and y."""
    x, y = vectors(*pair)
    sm, z2, d2 = np.exp(x @ y), ((x + y) ** 2).sum(), ((x - y) ** 2).sum()
    positive = np.exp(z2) * sm**2 * (1 - np.exp(-z2)) / M
    trigonometric = np.exp(z2) / sm**2 * (1 - np.exp(-d2)) ** 2 / (2 * M)
    expected = {
        "positive": positive,
        "trigonometric": trigonometric,
        "hyperbolic": positive * (1 - np.exp(-z2)) / 2,
    }
    for name in estimators.FORMULAS:
        found = estimators.squared_error(name, *pair, M)
        assert found == pytest.approx(expected[name])
    assert estimators.kernel(*pair) == pytest.approx(sm)
    assert estimators.ratio(*pair) == pytest.approx(trigonometric / positive)
    gain = 2 * (M - 1) / (M * (K + 2)) * (sm - np.exp(-(x @ x + y @ y) / 2)) ** 2
    found = estimators.orthogonal_bound(*pair, M, K)
    assert found == pytest.approx(positive - gain)
    # One row is orthogonal to no other.
    one = estimators.squared_error("positive", *pair, 1)
    assert estimators.orthogonal_bound(*pair, 1, K) == pytest.approx(one)


def test_where_positive_features_are_better():
    assert estimators.ratio(0.0, 1.0) == 0 and estimators.ratio(np.pi, 1.0) == np.inf
    for length in (0.5, 1.0, 2.0):
        angle = estimators.least_angle(length)
        assert estimators.ratio(angle, length) == pytest.approx(1)
        assert estimators.ratio(angle + 0.1, length) > 1
    # At a right angle SM = 1, z2 = d2 = 2 l^2, and the ratio is (1 - exp(-2 l^2)) / 2.
    assert estimators.ratio(np.pi / 2, 5.0) == pytest.approx(0.5)


def test_draws_are_the_formulas(tiny):
    # Those of a single pair are of the same draws, and not independent.
    off = {"mean": [], "squared_error": []}
    for one in tiny["kernel"]:
        if one["trusted"] and "formula" in one:
            for name, law in (("mean", "kernel"), ("squared_error", "formula")):
                off[name].append((one[name] - one[law]) / one[f"{name}_se"])
    assert len(off["mean"]) > 30
    assert all(np.abs(x).max() < 5 for x in off.values()), off


def test_orthogonal_rows_err_less(tiny):
    found = {
        (one["features"], one["rows"], one["angle"], one["length"]): one
        for one in tiny["kernel"]
        if one["trusted"] and one["length"] == 0.5
    }
    bounded = [key for key, one in found.items() if "bound" in one]
    assert len(bounded) > 5
    for key in bounded:
        one = found[key]
        law = estimators.squared_error("positive", *key[2:], tiny["m"])
        assert one["squared_error"] < one["bound"] + 3 * one["squared_error_se"]
        assert one["bound"] < law


def test_what_a_sample_knows():
    """Not less than normal errors, which know their square to sqrt(2 / n)."""
    assert estimators.spread("trigonometric", 0.1, 2.0, M, 300) == pytest.approx(0.1)
    # |x + y|^2 is 0 at pi, where nothing is heavy, and 16 at 0.
    assert estimators.spread("positive", np.pi, 2.0, M, 400) < 0.1
    assert estimators.spread("positive", 0.0, 2.0, M, 400) > 1e10


def test_attention_is_exact_where_all_keys_are_alike():
    rows = Rows("positive", True, 8, 4)
    errors = estimators.attention_errors(rows, 0.0, 11, (2, 8), 3)
    assert errors.shape == (3, 2) and errors.max() < 1e-6


def test_exact_attention_is_causal_softmax():
    q, k, v = np.random.default_rng(2).normal(size=(3, 1, 5, 1, 3)).astype(np.float32)
    found = estimators.exact_attention(q, k, v)
    for t in range(5):
        weights = np.exp(k[0, : t + 1, 0] @ q[0, t, 0])
        expected = weights @ v[0, : t + 1, 0] / weights.sum()
        np.testing.assert_allclose(found[0, t, 0], expected, rtol=1e-5)


def test_the_error_of_attention_falls_at_small_norms(tiny):
    (counts,) = {len(one["rms_error"]) for one in tiny["attention"]["errors"]}
    assert counts == len(tiny["attention"]["counts"])
    by_kind = {
        (one["features"], one["rows"], one["scale"]): one
        for one in tiny["attention"]["errors"]
    }
    assert len(by_kind) == 2 * 2 * 2
    small, large = (by_kind["positive", "iid", scale] for scale in (0.25, 1.0))
    assert small["slope"] < -0.3 and small["slope"] < large["slope"]
    assert max(small["rms_error"]) < min(large["rms_error"])


@pytest.mark.parametrize(
    "flag",
    ["--draws=1", "--draws=4000000000", "--width=1", "--width=2000", "--draws=many"],
)
def test_bad_input_is_one_line(flag, tmp_path, capsys):
    assert compare.main(["features:tiny", f"--out={tmp_path}", flag]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and flag.split("=")[0] in err
    assert not any(tmp_path.iterdir())
