"""The rules of sampling, on a distribution that is written down."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer.errors import UserError
from xlformer.generation.sampling import Sampling


def drawn(p, **settings):
    """How often each token comes in 2,003 draws from the literal distribution p."""
    log_p_RV = jnp.tile(jnp.log(jnp.array(p)), (2003, 1))
    ids = Sampling(**settings).draw(jax.random.key(7), log_p_RV)
    return collections.Counter(np.asarray(ids).tolist())


def test_draws_from_the_distribution():
    counts = drawn([0.5, 0.2, 0.3])
    for token, p in enumerate((0.5, 0.2, 0.3)):
        assert counts[token] / 2003 == pytest.approx(p, abs=0.04)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 0}, {1}),
        ({"temperature": 1e-30}, {1}),
        ({"temperature": 1e-60}, {1}),
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {0, 1, 3}),  # of equals the one with the smaller id
        ({"top_k": 97}, {0, 1, 2, 3}),
        ({"top_p": 0.05}, {1}),  # the first always stays
        ({"top_p": 0.45}, {1, 3}),
        ({"top_p": 0.75}, {0, 1, 3}),
        ({"top_p": 0.95}, {0, 1, 2, 3}),
        ({"top_k": 2, "top_p": 0.3}, {1}),
        ({"top_k": 2, "top_p": 0.9}, {1, 3}),
    ],
)
def test_what_may_be_drawn(settings, kept):
    assert set(drawn([0.15, 0.4, 0.15, 0.3], **settings)) == kept


def test_temperature_sharpens_and_flattens():
    share = {t: drawn([0.2, 0.8], temperature=t)[0] / 2003 for t in (0.5, 1.0, 3.0)}
    for t, found in share.items():
        a, b = 0.2 ** (1 / t), 0.8 ** (1 / t)
        assert found == pytest.approx(a / (a + b), abs=0.04)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5 must be finite and not negative"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1 must not be negative"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": float("nan")}, "top_p=nan"),
    ],
)
def test_refuses_impossible_settings(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)
