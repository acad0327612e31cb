"""Losses by place and by memory, of a model whose losses are known."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from xlformer import config as config_lib
from xlformer.errors import UserError
from xlformer.kernels import watching
from xlformer.kernels.watching import Inside
from xlformer.models import Aux, Model
from xlformer.reporting import insides, measured, subject

T = 7


@dataclasses.dataclass(frozen=True)
class ClockConfig:
    vocab_size: int = 5
    memory_length: int | None = 8


@dataclasses.dataclass(frozen=True)
class Clock(Model):
    """The nll of a token is its place in the segment, and 100 for what it forgets."""

    @property
    def memory_length(self):
        return self.config.memory_length

    def init(self, key):
        return {"w": jnp.zeros(())}

    def init_state(self, batch_size, dtype=None):
        return jnp.zeros((batch_size, 1))

    def state_axes(self):
        return ("batch", None)

    def apply(self, params, inputs_BT, targets_BT, state, **options):
        place_BT = jnp.broadcast_to(jnp.arange(1.0 * T)[None], targets_BT.shape)
        forgotten = 100.0 * (16 - (self.config.memory_length or 0))
        return place_BT + forgotten + params["w"], state, Aux(jnp.zeros(()), {})


class Bound(Clock):
    """One that cannot be read with any other memory."""

    def for_reading(self, **fields):
        raise UserError("it is bound")


def one(model, tokens=173):
    config = config_lib.load("quickstart:debug")
    config.train.segment_length = T
    run = types.SimpleNamespace(config=config, params={"w": np.float32(0)}, step=3)
    member = types.SimpleNamespace(name="clock", model=model, run=run)
    ids_N = np.arange(tokens) % 5
    about = types.SimpleNamespace(
        text=lambda member: (ids_N, None, {}), tokens=tokens, say=lambda line: None
    )
    return about, member


class Telling(Clock):
    """Tells how many resets there were at each place, as what is seen."""

    def inspect(self, params, inputs_BT, state, *, resets_BT, step=None):
        seen_T = resets_BT.sum(0)
        found = watching.ByDistance(seen_T[None] + 0.0, seen_T)
        return Inside({"layer": found}, {}, {}), state


# With a state rows begin anywhere, else where a segment of the one row does.
@pytest.mark.parametrize(("memory", "rows"), [(0, 1), (8, 1), (None, 8)])
def test_each_token_is_counted_at_its_place(memory, rows):
    model = Clock(ClockConfig(memory_length=memory))
    about, member = one(model, 8 * 24)
    found = measured.losses(about, member, model)
    assert found.targets_T.sum() == 8 * 24 - rows and len(found.targets_T) == T
    forgotten = 100 * (16 - (memory or 0))
    np.testing.assert_allclose(found.nats_T / found.targets_T, np.arange(T) + forgotten)
    assert found.between(2, 4) == pytest.approx(forgotten + 2.5, abs=0.1)
    assert np.isnan(found.between(3, 3))


def test_all_memories_score_the_same_tokens():
    model = Clock(ClockConfig())
    about, member = one(model)
    before = measured.losses(about, member, model)
    scored = types.SimpleNamespace(subject=about, found={"clock": before})
    found = measured._sweep(scored, member)
    assert list(found) == [0, 2, 4, 8, 16, 32]
    difference = {n: nats - before.mean for n, nats in found.items()}
    assert difference == pytest.approx({n: 100 * (8 - n) for n in found})


def test_a_model_says_why_its_memory_is_what_it_is():
    model = Bound(ClockConfig())
    about, member = one(model)
    before = measured.losses(about, member, model)
    scored = types.SimpleNamespace(subject=about, found={"clock": before})
    with pytest.raises(UserError, match="it is bound"):
        measured._sweep(scored, member)


def test_documents_are_apart_inside_too():
    about, member = one(Telling(ClockConfig(memory_length=0)), 2 * 4 * T + 1)
    # Two rows of four segments, the second of which begins one token after the first.
    documents = np.array([0, 3, T + 3, 4 * T + 2])
    about.text = lambda member: (np.zeros(2 * 4 * T + 1, int), documents, {})
    (found,) = insides._look(about, member).inside.attention.values()
    # The rows begin at 0 and 29, which is 4 T + 1.
    np.testing.assert_array_equal(found.seen_S, [1, 1, 0, 2, 0, 0, 0])


def test_distances_are_binned_without_loss():
    rng, S = np.random.default_rng(0), 211
    seen_S = np.maximum(0, 200 - np.arange(S)).astype(float)
    weight_S = rng.random(S) * (seen_S > 0)
    distance, mean = insides.binned(weight_S, seen_S)
    np.testing.assert_array_equal(distance[:16], np.arange(16))
    np.testing.assert_allclose(mean[:16], weight_S[:16] / seen_S[:16])
    assert (np.diff(distance) > 0).all() and len(distance) < 40
    # The last bin that is seen at all, and its mean.
    assert distance[-1] < 211 and mean[-1] > 0
    flat = insides.binned(seen_S * 0.25, seen_S)[1]
    np.testing.assert_allclose(flat, 0.25)


def test_what_is_said_of_several_is_said_once():
    found = subject.together({"a": "long", "b": "short", "c": "long"})
    assert found == "a, c: long; b: short"
