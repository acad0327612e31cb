"""A window of last tokens: exactly what the model says of them alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer import models
from xlformer.generate import Sampling, generate
from xlformer.models import UniversalConfig
from xlformer.models.base import Model
from xlformer.models.windowed import Windowed

V, W, T = 19, 5, 7
FIELDS = dict(vocab_size=V, n_step=2, d_model=8, n_head=2, d_inner=11, dropout=0.0)
ACT = models.build(UniversalConfig(**FIELDS, act="convex", context_length=W))


@dataclasses.dataclass(frozen=True)
class Sum(Model):
    """The next token is likely the sum of all before it, times their number."""

    config: int = V

    vocab_size = V

    def dtype(self, params):
        return jnp.dtype(jnp.float32)

    def init_state(self, batch_size, dtype=None):
        return jnp.zeros((batch_size,), jnp.int32)

    def log_probs(self, params, inputs_BT, state, *, lengths_B=None, step=None):
        count_T = jnp.arange(inputs_BT.shape[1])[None] + 1
        next_BT = jnp.cumsum(inputs_BT, 1) * count_T % V
        return jax.nn.log_softmax(3 * jax.nn.one_hot(next_BT, V)), state


def score(model, params, ids_BT, state, resets_BT, lengths_B):
    options = dict(resets_BT=resets_BT, lengths_B=lengths_B)
    log_probs_BTV, after = model.log_probs(params, ids_BT, state, **options)
    nll_BT, also, _ = model.apply(params, ids_BT, ids_BT, state, **options)
    return log_probs_BTV, nll_BT, (after, also)


@pytest.mark.parametrize("model", [ACT, Sum()], ids=["tokens", "own"])
def test_a_token_sees_the_last_of_its_text_and_nothing_else(model):
    params = None if model is not ACT else jax.jit(ACT.init)(jax.random.key(0))
    window = Windowed.of(model, W)
    ids_BN = np.random.default_rng(0).integers(V, size=(2, 2 * T))
    resets_BN = np.zeros((2, 2 * T), bool)
    resets_BN[1, T + 3] = True
    # Row 0 has two tokens of padding in its first segment, which count for nothing.
    lengths = np.array([T - 2, T]), np.array([T, T])
    run = jax.jit(score, static_argnums=0)
    state, parts = window.init_state(2), []
    for s, lengths_B in enumerate(lengths):
        here = slice(s * T, (s + 1) * T)
        arrays = ids_BN[:, here], state, resets_BN[:, here], lengths_B
        log_probs_BTV, nll_BT, (state, also) = run(window, params, *arrays)
        jax.tree.map(np.testing.assert_array_equal, state, also)
        at_BT = jnp.take_along_axis(log_probs_BTV, arrays[0][..., None], 2)[..., 0]
        valid_BT = np.arange(T)[None] < lengths_B[:, None]
        np.testing.assert_allclose(nll_BT, np.where(valid_BT, -at_BT, 0), 0, 1e-6)
        parts.append(np.asarray(log_probs_BTV))
    texts = [*ids_BN[0, : T - 2], *ids_BN[0, T:]], ids_BN[1]
    inner = jax.jit(model.log_probs)

    def alone(ids):
        ids_1W = np.zeros((1, W), int)
        ids_1W[0, : len(ids)] = ids
        lengths_B = np.array([len(ids)])
        state = model.init_state(1)
        found, _ = inner(params, ids_1W, state, lengths_B=lengths_B)
        return found[0, len(ids) - 1]

    for b, t in (
        (0, 0),
        (0, 3),
        (0, 4),
        (0, 5),
        (0, 11),
        (1, 6),
        (1, 9),
        (1, 10),
        (1, 13),
    ):
        begins = T + 3 if b == 1 and t >= T + 3 else 0
        found = np.concatenate(
            [part[b, : n[b]] for part, n in zip(parts, lengths, strict=True)]
        )[t]
        expected = alone(texts[b][max(begins, t - W + 1) : t + 1])
        np.testing.assert_allclose(found, expected, 0, 1e-5)


def test_generation_slides_over_a_prompt_longer_than_the_window():
    assert ACT.for_generation() == Windowed.of(ACT, W)
    params = jax.jit(ACT.init)(jax.random.key(0))
    prompts = [np.arange(11), np.arange(11 - W, 11), np.arange(11 - W + 1, 11)]
    found, chosen = generate(
        ACT, params, prompts, num_tokens=3, sampling=Sampling(top_k=1)
    )
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(chosen[0], chosen[1], 0, 1e-6)
    assert abs(chosen[0, 0] - chosen[2, 0]) > 1e-4  # the oldest token does count
