"""One training step as a pure function: (state, batch) -> (state, metrics)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from xlformer.errors import UserError
from xlformer.models import Aux
from xlformer.training import averaging, objectives, optimizers, spikes
from xlformer.training.gradients import batch_axis, make_gradients
from xlformer.training.state import Place, TrainState

# The names that the loop logs under, or their parts before a slash. A model that logged
# one of them would write over the loop's own numbers in the same record.
RESERVED = ("train", "eval", "norm", "spike", "perf", "goodput", "step", "kind", "time")


def make_step(config, model, optimizer, schedule):
    """Returns step(state, batch) for the batches of data.stream.Stream.

    Dropout: the keys are key = fold_in(key(seed), step) and, for each row of the batch,
    fold_in(key, row): whoever replays a step drops the same units, however many
    segments one call holds, in whatever micro batches and on whatever mesh. What an
    objective draws comes from fold_in(fold_in(key, objectives.STREAM), row).
    """
    train = config.train
    # Nobody else asks for it: a schedule inside the model is one of training.
    model = model.for_training(train.steps)
    objective = objectives.build(train, model)
    base_key, tail_start = jax.random.key(config.seed), averaging.tail_start(train)
    gradients = make_gradients(
        _loss(train, model),
        micro_batches=train.micro_batches,
        state_axes=model.state_axes(),
    )

    def step_fn(old: TrainState, batch) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(base_key, old.step)
        with jax.named_scope("gradients"):
            examples = _examples(objective, batch, key, half=train.half_loss)
            examples["step"] = old.step
            grads, (carried, metrics) = gradients(
                old.params, old.carried, examples, key
            )
        with jax.named_scope("update"):
            # The norm before clipping. A loss may be finite where its gradient is not.
            norm = optax.tree.norm(grads)
            finite = jnp.isfinite(metrics["train/loss_nats"]) & jnp.isfinite(norm)
            rate = schedule(old.step, old.plateau.scale)
            if config.optimizer.length_scaled:
                rate = optimizers.length_scaled(
                    rate, batch["length"], train.segment_length
                )
            options = {"ema_decay": train.ema_decay, "tail_start": tail_start}
            new, rate = moved(old, optimizer, grads, rate, **options)
            new = new._replace(carried=carried)
            if train.skip_nonfinite:
                # A dropped step leaves everything as it was, the memory too, which may
                # hold NaN now. But what follows the segment must not see past its
                # resets: a row that had one begins anew.
                rows_B = batch["resets_BT"].any(axis=1)
                fresh = reset_rows(model, old.carried, rows_B)
                kept = old._replace(carried=fresh)
                new = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, kept)
            guard, ratio = _guarded(train, old, metrics["train/loss_nats"], finite)
            # The step counts also where it was dropped: the batch is a function of it,
            # and the run would read the same segment for ever.
            new = new._replace(
                step=old.step + 1,
                data=Place(batch["epoch"], batch["offset"], batch["length"]),
                spikes=guard,
                skipped=old.skipped + jnp.where(finite, 0, 1).astype(jnp.int32),
                skipped_in_a_row=jnp.where(finite, 0, old.skipped_in_a_row + 1),
            )
        return new, {
            **metrics,
            **ratio,
            "norm/grad": norm,
            "train/learning_rate": rate,
            "train/finite": finite,
            "train/skipped": new.skipped,
            "train/skipped_in_a_row": new.skipped_in_a_row,
        }

    return step_fn


def _loss(train, model):
    """loss_fn of make_gradients; train: the section of a config."""

    def loss_fn(params, carried, batch, rngs):
        nll_BT, carried, aux = model.apply(
            params,
            batch["inputs_BT"],
            batch["targets_BT"],
            carried,
            resets_BT=batch["resets_BT"],
            # Only where lengths vary: without them the memory is cut at a place that
            # is known at compile time.
            lengths_B=batch["length"] if train.variable_length else None,
            step=batch["step"],
            train=True,
            rngs=rngs,
        )
        _check_given(model, nll_BT, batch["targets_BT"], aux)
        # The mean divides by what rows weigh on average, not by what these weigh: where
        # another group has more of the hidden tokens, the mean of two means would not
        # be the mean of all.
        weight = batch["row_weight"] * nll_BT.shape[0]
        mean = (nll_BT * batch["weights_BT"]).sum() / weight
        # As their means over groups of rows are: a sum of bfloat16 over devices aborts
        # the process on a CPU (jax 0.10.2), and int8 overflows.
        own = {name: jnp.asarray(x, jnp.float32) for name, x in aux.metrics.items()}
        return mean + aux.loss, (carried, {"train/loss_nats": mean, **own})

    return loss_fn


def make_steps(step_fn):
    """Several steps in one call, which a host dispatches and reads as one.

    Leaves of the batch and of the metrics have the steps as their first axis.
    """

    def steps_fn(train_state, batches):
        return lax.scan(step_fn, train_state, batches)

    return steps_fn


def make_evaluated(optimizer):
    """Returns note(plateau, averaging, loss of a validation, step).

    It gives the entries of the TrainState that the next step reads instead.
    optimizer: the section of a config.
    """

    def note(plateau: optimizers.Plateau, average, loss, step) -> dict:
        plateau = optimizers.plateau_update(
            plateau,
            loss,
            factor=optimizer.plateau_factor,
            patience=optimizer.plateau_patience,
        )
        if average is not None:
            average = averaging.validated(average, loss)
        evaluated = jnp.asarray(step, jnp.int32)
        return {"plateau": plateau, "averaging": average, "evaluated": evaluated}

    return note


def loss_weights(shape, length, *, half: bool) -> jax.Array:
    """1 for targets that count: before `length`, and with `half` in its later half.

    The half loss is that of the paper's ablation (Dai et al. 2019, table 6).
    """
    index_BT = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    counts_BT = index_BT < length
    if half:
        counts_BT &= index_BT >= length // 2
    return counts_BT.astype(jnp.float32)


def _examples(objective, batch, key, *, half: bool) -> dict:
    """The batch as the objective has it, with weights of its losses.

    weights_BT says how much each loss counts, row_weight how much those of a row count
    together, in the mean over all rows of the batch.
    """
    B, T = batch["targets_BT"].shape
    # Drawn for the whole batch before it is cut into groups of rows, so that its weight
    # is known to all of them.
    counts_1T = loss_weights((1, T), batch["length"], half=half)
    key = jax.random.fold_in(key, objectives.STREAM)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    inputs_BT, targets_BT, weights_BT = objective.examples(
        batch["inputs_BT"], batch["targets_BT"], keys_B, jnp.arange(T)[None]
    )
    if weights_BT is None:
        # All rows weigh the same: nothing is summed over them, and over devices.
        weights_BT, row_weight = jnp.broadcast_to(counts_1T, (B, T)), counts_1T.sum()
    else:
        weights_BT = counts_1T * weights_BT
        row_weight = jnp.maximum(weights_BT.sum(), 1) / B  # There may be none at all.
    found = {"inputs_BT": inputs_BT, "targets_BT": targets_BT, "weights_BT": weights_BT}
    return {**batch, **found, "row_weight": row_weight}


def average_weight(decay: float, n) -> jax.Array:
    """The weight of the parameters after the n-th step in their average; n from 1 on.

    (1 - d) / (1 - d^n): what is averaged are the steps, each d times as much as the
    next, and not the initial parameters, of which a weight of 1 - d would leave d^n (37
    % after 1,000 steps with 0.999).
    """
    n = jnp.asarray(n, jnp.float32)
    # 1 - d^n would lose its digits in float32 where d^n is near 1: hence expm1.
    return jnp.where(n == 1, 1, (1 - decay) / -jnp.expm1(n * math.log(decay)))


def reset_rows(model, carried, rows_B):
    """A model's state with some rows as they are before the first token."""
    fresh = model.init_state(rows_B.shape[0])

    def reset(old, new, axis):
        shape = [1] * old.ndim
        shape[axis] = -1
        return jnp.where(rows_B.reshape(shape), new.astype(old.dtype), old)

    axes = batch_axis(carried, model.state_axes())
    return jax.tree.map(reset, carried, fresh, axes)


def _check_given(model, nll_BT, targets_BT, aux) -> None:
    """Raises UserError where a model of one's own gives what no step can use.

    What it logs has names that the loop does not write itself.
    """
    who = f"{type(model).__name__} returns"
    if jnp.shape(nll_BT) != targets_BT.shape:
        shapes = f"{jnp.shape(nll_BT)} for targets of shape {targets_BT.shape}"
        raise UserError(f"{who} an nll of shape {shapes}")
    if not (isinstance(aux, Aux) and isinstance(aux.metrics, Mapping)):
        raise UserError(f"{who} {aux!r:.99} where Aux(loss, metrics) has its place")
    _check_number(f"{who} aux.loss", aux.loss)
    for name, value in aux.metrics.items():
        shown = f"{who} aux.metrics[{name!r}]"
        if str(name).partition("/")[0] in RESERVED:
            raise UserError(
                f"{shown}, a name of the loop's own: a model's begin with none of "
                f"{', '.join(RESERVED)}"
            )
        _check_number(shown, value)


def _check_number(shown: str, value) -> None:
    is_array = isinstance(value, jax.Array | np.ndarray)
    if is_array and not value.shape or isinstance(value, float | int | np.generic):
        return
    what = f"shape {value.shape}" if is_array else f"type {type(value).__name__}"
    raise UserError(f"{shown} of {what}: each is one number, the mean over rows")


def moved(old: TrainState, optimizer, grads, rate, *, ema_decay=0.0, tail_start=0):
    """`old` after one step of the optimizer: parameters, its arrays, their average.

    Returns the rate that it had too: in NT-ASGD a scheduled one takes effect late.
    ema_decay and tail_start, of averaging.py, are of the averages that are kept.
    """
    average, scheduled = old.averaging, rate
    if average is not None:
        rate = averaging.rate(average, scheduled)
    updates, opt_state = optimizer.update(grads, old.opt_state, old.params)
    # The rate multiplies here and not in the optimizer: it depends on a plateau, which
    # lies in the state, and optax's chains know nothing of that.
    params = jax.tree.map(
        lambda p, u: p - (rate * u).astype(p.dtype), old.params, updates
    )
    ema, tail, w = old.ema, old.tail, None
    if ema_decay:
        # By the steps that were taken: a dropped one has added nothing to the average.
        w = average_weight(ema_decay, old.step - old.skipped + 1)
    elif average is not None:
        w = averaging.weight(average)
        average = averaging.stepped(average, scheduled)
    elif tail is not None:
        tail = averaging.tail_stepped(tail, old.step, tail_start)
        w = averaging.tail_weight(tail)
    if w is not None:
        ema = jax.tree.map(
            lambda a, p: ((1 - w) * a + w * p).astype(a.dtype), ema, params
        )
    changed = {"params": params, "opt_state": opt_state, "ema": ema}
    return old._replace(**changed, averaging=average, tail=tail), rate


def _guarded(train, old: TrainState, loss, finite):
    """What the guard against loss spikes knows after this loss, and what it logs."""
    if not train.spike_factor:
        return old.spikes, {}
    settings = {"warmup": train.spike_after}
    if train.skip_nonfinite:  # What is dropped already is no spike.
        settings["dropped"] = ~finite
    ratio = spikes.ratio(old.spikes, loss, **settings)
    guard = spikes.update(old.spikes, loss, factor=train.spike_factor, **settings)
    return guard, {"spike/ratio": ratio}
