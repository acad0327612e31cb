"""Training on rows whose targets count where an answer stands, and what is right then.

For tasks that have no text: a batch is what `Model.apply` takes, and weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xlformer import models

Batch = tuple[dict, np.ndarray]


def fit(
    model: models.Model,
    batches: Iterable[Batch],
    *,
    rate: float,
    steps: int,
    seed: int = 0,
    say: Callable[[int, float], Any] | None = None,
):
    """Adam with a warm-up and a cosine; returns the parameters and the last loss.

    Args:
      model: to train; its state begins anew in each batch.
      batches: (what `Model.apply` takes, weights of the targets), at least `steps`.
      rate: the highest one.
      seed: of the parameters and of dropout.
      say: called with the step and its loss, ten times.
    """
    update, init = programs(model, rate, steps)
    key = jax.random.key(seed)
    params, moments = init(key)
    value = np.nan
    for step, (batch, weights_BT) in zip(range(steps), batches, strict=False):
        params, moments, value = update(
            params, moments, batch, weights_BT, key, np.int32(step)
        )
        if say is not None and step % max(1, steps // 10) == 0:
            say(step, float(value))
    return params, float(value)


@functools.lru_cache(maxsize=16)
def programs(model: models.Model, rate: float, steps: int):
    """What is compiled once for a model: (update, init)."""
    model = model.for_training(steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss(params, batch, weights_BT, key, step):
        state = model.init_state(len(weights_BT))
        rngs = {"dropout": jax.random.fold_in(key, step)}
        nll_BT, _, aux = model.apply(
            params, **batch, state=state, step=step, train=True, rngs=rngs
        )
        # What a model adds, such as the price of pondering, comes on top.
        return (nll_BT * weights_BT).sum() / weights_BT.sum() + aux.loss

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, moments, batch, weights_BT, key, step):
        value, grads = jax.value_and_grad(loss)(params, batch, weights_BT, key, step)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    @jax.jit
    def init(key):
        params = model.init(key)
        return params, optimizer.init(params)

    return update, init


@functools.partial(jax.jit, static_argnums=0)
def right(model: models.Model, params, batch: dict) -> jax.Array:
    """Whether each target is the likeliest symbol, [B, T]; of NaN none is."""
    targets_BT = batch["targets_BT"]
    given = {name: x for name, x in batch.items() if name != "targets_BT"}
    state = model.init_state(len(targets_BT))
    log_probs_BTV, _ = model.log_probs(params, **given, state=state)
    # Of numbers that are none argmax is 0, which is a digit.
    finite_BT = ~jnp.isnan(log_probs_BTV).any(axis=-1)
    return finite_BT & (jnp.argmax(log_probs_BTV, axis=-1) == targets_BT)


@functools.partial(jax.jit, static_argnums=0)
def metrics(model: models.Model, params, batch: dict) -> dict:
    """What the model says of itself beside its losses, such as how long it ponders."""
    state = model.init_state(len(batch["targets_BT"]))
    return model.apply(params, **batch, state=state)[2].metrics


def accuracies(model: models.Model, params, batch: dict, weights_BT):
    """Of characters, and of rows: one counts where all that is scored in it is right.

    Each character is asked for given those before it, so that greedy generation would
    have made the same row.
    """
    scored_BT = weights_BT > 0
    right_BT = np.asarray(right(model, params, batch))
    characters = right_BT[scored_BT].mean()
    return float(characters), float((right_BT | ~scored_BT).all(axis=1).mean())
