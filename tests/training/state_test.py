"""The state between two steps: complete, of fixed shapes, and donated at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from training_runs import assert_same, bag, refusal, small_config

from xlformer import models, sharding
from xlformer.runs.checkpoints import Checkpoints
from xlformer.training import optimizers, spikes, state
from xlformer.training.compiling import TrainingStep


def create(config, model):
    optimizer = optimizers.build(config.optimizer)
    return functools.partial(state.create, config, model, optimizer)


def test_shapes_without_computing():
    config = small_config(batch_size=3, ema_decay=0.5)
    config.optimizer.name = "adam"
    make = create(config, models.build(config.model, vocab_size=13))
    found = jax.eval_shape(make, jax.random.key(0))
    shapes = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    params = shapes(found.params)
    assert shapes(found.ema) == params
    assert shapes(found.opt_state[0].mu) == params == shapes(found.opt_state[0].nu)
    assert found.carried.hidden_LBMD.shape == (2, 3, 5, 16)
    assert found.carried.length_B.shape == (3,)
    counters = (found.step, *found.data, found.evaluated, found.skipped)
    for x in (*counters, found.skipped_in_a_row):
        assert (x.shape, x.dtype) == ((), jnp.int32)


def test_a_fresh_state_is_a_function_of_the_key():
    make = jax.jit(create(small_config(), bag()))
    one, same, other = (make(jax.random.key(k)) for k in (1, 1, 2))
    assert one.ema is None and int(one.step) == int(one.evaluated) == 0
    assert float(one.plateau.scale) == 1 and np.isinf(one.plateau.best)
    assert (one.params["table_VV"] == same.params["table_VV"]).all()
    assert (one.params["table_VV"] != other.params["table_VV"]).any()


def test_all_of_it_can_be_donated():
    make = jax.jit(create(small_config(ema_decay=0.5), bag()))
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    found = make(jax.random.key(1))
    after = step(found)  # One buffer in two places would be donated twice.
    assert all(x.is_deleted() for x in jax.tree.leaves(found))
    assert int(after.step) == 1


def test_what_an_earlier_release_did_not_save_begins_anew(tmp_path, monkeypatch):
    """An entry that is in state.LATER; any other one that is missing is refused."""
    made = TrainingStep(small_config(), bag(), sharding.make_mesh({"data": 1}))
    key, old = jax.random.key(3), jax.jit(made.create)(jax.random.key(1))
    old = old._replace(step=jnp.int32(5), spikes=None)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, old, config={})
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert "has spikes/average as nothing" in refusal(made.restored, checkpoints, key)
    monkeypatch.setattr(state, "LATER", ("evaluated", "spikes"))
    step, found, _ = made.restored(checkpoints, key)
    assert step == 5
    assert_same(found, old._replace(spikes=spikes.init()))
