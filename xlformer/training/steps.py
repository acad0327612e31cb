"""One training step as a pure function: (state, batch) -> (state, metrics)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
from jax import lax

from xlformer.errors import UserError
from xlformer.training import optimizers, spikes
from xlformer.training.gradients import batch_axis, make_gradients
from xlformer.training.state import Place, TrainState

# Of the names that the loop logs under, and of the parts of them before a slash.
RESERVED = ("train", "eval", "norm", "spike", "perf", "goodput", "step", "kind", "time")


def make_step(config, model, optimizer, schedule):
    """Returns step(state, batch) for the batches of data.stream.Stream.

    Dropout: the keys are key = fold_in(key(seed), step) and, for each row of the batch,
    fold_in(key, row): whoever replays a step drops the same units, however many
    segments one call holds, in whatever micro batches and on whatever mesh.
    """
    train = config.train
    base_key = jax.random.key(config.seed)

    def loss_fn(params, carried, batch, rngs):
        nll_BT, carried, aux = model.apply(
            params,
            batch["inputs_BT"],
            batch["targets_BT"],
            carried,
            resets_BT=batch["resets_BT"],
            lengths_B=batch["length"] if train.variable_length else None,
            step=batch["step"],
            train=True,
            rngs=rngs,
        )
        weights_BT = loss_weights(nll_BT.shape, batch["length"], half=train.half_loss)
        mean = (nll_BT * weights_BT).sum() / weights_BT.sum()
        own = _own_metrics(model, aux.metrics)
        return mean + aux.loss, (carried, {"train/loss_nats": mean, **own})

    gradients = make_gradients(
        loss_fn, micro_batches=train.micro_batches, state_axes=model.state_axes()
    )

    def step_fn(state: TrainState, batch) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(base_key, state.step)
        with jax.named_scope("gradients"):
            grads, (carried, metrics) = gradients(
                state.params, state.carried, {**batch, "step": state.step}, key
            )
        with jax.named_scope("update"):
            return _update(
                *(config, model, optimizer, schedule),
                *(state, batch, grads, carried, metrics),
            )

    return step_fn


def make_steps(step_fn):
    """Several steps in one call: batch leaves get a leading axis, metrics too."""

    def steps_fn(state, batches):
        return lax.scan(step_fn, state, batches)

    return steps_fn


def make_evaluated(config):
    """Returns note(plateau, loss of a validation, step): what the state remembers."""

    def note(plateau: optimizers.Plateau, loss, step):
        plateau = optimizers.plateau_update(
            plateau,
            loss,
            factor=config.optimizer.plateau_factor,
            patience=config.optimizer.plateau_patience,
        )
        return plateau, jnp.asarray(step, jnp.int32)

    return note


def loss_weights(shape, length, *, half: bool) -> jax.Array:
    """1 for targets that count: before `length`, and with `half` in its later half."""
    index_BT = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    counts_BT = index_BT < length
    if half:
        counts_BT &= index_BT >= length // 2
    return counts_BT.astype(jnp.float32)


def average_weight(decay: float, n) -> jax.Array:
    """Of the parameters after the n-th step taken in their average, from n = 1 on.

    (1 - d) / (1 - d^n): what is averaged are the steps, each d times as much as the
    next, and not the initial parameters, of which a weight of 1 - d would leave d^n (37
    % after 1,000 steps with 0.999).
    """
    n = jnp.asarray(n, jnp.float32)
    # 1 - d^n would lose its digits in float32 where d^n is near 1.
    return jnp.where(n == 1, 1, (1 - decay) / -jnp.expm1(n * math.log(decay)))


def reset_rows(model, carried, rows_B):
    """A model's state with rows as they are before the first token."""
    fresh = model.init_state(rows_B.shape[0])

    def reset(old, new, axis):
        shape = [1] * old.ndim
        shape[axis] = -1
        return jnp.where(rows_B.reshape(shape), new.astype(old.dtype), old)

    axes = batch_axis(carried, model.state_axes())
    return jax.tree.map(reset, carried, fresh, axes)


def _own_metrics(model, metrics):
    """What a model logs, under names that the loop does not write itself."""
    for name, value in metrics.items():
        if name.partition("/")[0] in RESERVED:
            raise UserError(
                f"{type(model).__name__} returns aux.metrics[{name!r}], a name of the "
                f"loop's own: a model's begin with none of {', '.join(RESERVED)}"
            )
        if jnp.ndim(value):
            raise UserError(
                f"{type(model).__name__} returns aux.metrics[{name!r}] of shape "
                f"{jnp.shape(value)}: each is one number, the mean over rows"
            )
    return metrics


def _update(config, model, optimizer, schedule, state, batch, grads, carried, metrics):
    train = config.train
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    rate = schedule(state.step, state.plateau.scale)
    params = jax.tree.map(
        lambda p, u: p - (rate * u).astype(p.dtype), state.params, updates
    )
    ema = state.ema
    if train.ema_decay:
        w = average_weight(train.ema_decay, state.step - state.skipped + 1)
        ema = jax.tree.map(
            lambda a, p: ((1 - w) * a + w * p).astype(a.dtype), ema, params
        )
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["train/loss_nats"]) & jnp.isfinite(norm)
    moved = (params, opt_state, ema, carried)
    if train.skip_nonfinite:
        # What follows a dropped segment must not see past its resets either.
        before = reset_rows(model, state.carried, batch["resets_BT"].any(1))
        kept = (state.params, state.opt_state, state.ema, before)
        moved = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, kept)
    params, opt_state, ema, carried = moved
    skip = jnp.where(finite, 0, 1).astype(jnp.int32)
    guard, loss = state.spikes, metrics["train/loss_nats"]
    if train.spike_factor:
        settings = {"warmup": train.spike_after}
        if train.skip_nonfinite:  # What is dropped already is no spike.
            settings["dropped"] = ~finite
        metrics["spike/ratio"] = spikes.ratio(guard, loss, **settings)
        guard = spikes.update(guard, loss, factor=train.spike_factor, **settings)
    state = state._replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=ema,
        carried=carried,
        data=Place(batch["epoch"], batch["offset"], batch["length"]),
        spikes=guard,
        skipped=state.skipped + skip,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )
    return state, {
        **metrics,
        "norm/grad": norm,
        "train/learning_rate": rate,
        "train/finite": finite,
        "train/skipped": state.skipped,
        "train/skipped_in_a_row": state.skipped_in_a_row,
    }
