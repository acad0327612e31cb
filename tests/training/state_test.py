"""The state between two steps: complete, of fixed shapes, and donated at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from training_runs import bag, small_config

from xlformer import models
from xlformer.training import optimizers, state


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
