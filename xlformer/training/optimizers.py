"""Learning rates, gradient clipping and optimizers, from the `optimizer` section.

The transformation of `build` has no learning rate: the train step multiplies its
updates by `-learning_rate(...)(step, scale)`, so that the rate can depend on the step
and on a plateau without rebuilding the optimizer.

Parameters of layers are stored stacked, [L, ...], under a key named 'layers'. Whatever
is defined per tensor (LAMB's trust ratio, the rank that exempts biases and norms from
weight decay) is per layer here: a stack behaves as its layers would one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from xlformer.models.sides import is_stacked, of_two_axes
from xlformer.training import by_matrix

# How names of biases end, which weight decay spares. u and v are Transformer-XL's, of a
# layer or of all: matrices [H, K] that are biases all the same. SHA-RNN's other gates
# are three vectors [3, D], beside gates that are one each.
BIASES = (
    *("bias", "attention/u", "attention/v", "trunk/u", "trunk/v"),
    "attention/other_gates",
)

# What a larger norm of a parameter counts as in the LAMB of SHA-RNN.
SHA_RNN_MAX_NORM = 10.0


# Learning rates ---------------------------------------------------------------------


def learning_rate(config, total_steps: int) -> Callable[..., jax.Array]:
    """Returns schedule(step, scale=1.0) -> float32 rate for the `optimizer` section.

    step counts completed updates, so the first update has step 0 (rate 0 if there is a
    warm-up, as in the TensorFlow original); a warm-up counts from warmup_from on: with
    1 the first update has 1 / warmup_steps of the rate. scale is the plateau's and
    touches nothing but the 'plateau' schedule. The function is jit-able. With f =
    final_fraction:

    - cosine (PyTorch original): warm-up, then a cosine of step / total: it jumps down
      a little where the warm-up ends.
    - cosine_after_warmup (TensorFlow original): of (step - warmup) / (total - warmup).
    - inverse_sqrt (PyTorch original): lr * step / warmup^1.5, after the warm-up
      lr / sqrt(step): continuous, and its peak is lr / sqrt(warmup), not lr.
    - constant, plateau: warm-up, then lr.
    - steps (AWD-LSTM): lr, times decay_factor from each decay_at * total on.

    Both cosines end at f * lr and stay there.
    """
    decay = SCHEDULES[config.schedule]
    peak, warmup = config.learning_rate, config.warmup_steps
    # lr * step / warmup^1.5 meets lr / sqrt(step) where step is warmup.
    ramp_to = peak * (warmup**-0.5 if warmup and decay is _inverse_sqrt else 1.0)

    def schedule(step, scale=1.0) -> jax.Array:
        # float32 counts steps exactly up to 2^24, four times the longest schedule here.
        step = jnp.asarray(step, jnp.float32)
        after = peak * decay(step, total_steps, config)
        counted = step + config.warmup_from
        rate = jnp.where(counted < warmup, ramp_to * counted / max(warmup, 1), after)
        return (
            rate * jnp.asarray(scale, jnp.float32)
            if config.schedule == "plateau"
            else rate
        )

    return schedule


def next_rate(config, step: int, scale: float) -> float:
    """The learning rate that a run of this config uses at `step`; scale: plateau's."""
    return float(learning_rate(config.optimizer, config.train.steps)(step, scale))


def length_scaled(rate, length, segment_length: int):
    """The rate of a segment of this length, where lengths vary (AWD-LSTM).

    Its gradient is a mean over fewer tokens than another's.
    """
    return rate * length / segment_length


def _cosine(step, total, config):
    return _half_cosine(step / max(total, 1), config.final_fraction)


def _cosine_after_warmup(step, total, config):
    warmup = config.warmup_steps
    progress = (step - warmup) / max(total - warmup, 1)
    return _half_cosine(progress, config.final_fraction)


def _half_cosine(progress, floor):
    wave = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
    return floor + (1 - floor) * wave


def _inverse_sqrt(step, total, config):
    # Step 0 without a warm-up has the rate of step 1, and no division by 0.
    return jax.lax.rsqrt(jnp.maximum(step, 1.0))


def _constant(step, total, config):
    return jnp.ones_like(step)


def _steps(step, total, config):
    # In whole steps: 0.07 * 100 is a little more than 7 to a computer.
    at_N = jnp.array([round(at * total) for at in config.decay_at], step.dtype)
    return config.decay_factor ** (step >= at_N).sum().astype(step.dtype)


SCHEDULES = {
    "cosine": _cosine,
    "cosine_after_warmup": _cosine_after_warmup,
    "inverse_sqrt": _inverse_sqrt,
    "constant": _constant,
    "plateau": _constant,
    "steps": _steps,
}


class Plateau(NamedTuple):
    """What 'plateau' remembers between evaluations; lives in the TrainState."""

    best: jax.Array  # lowest finite loss so far
    bad_count: jax.Array  # evaluations since without improvement
    scale: jax.Array  # of the learning rate


def plateau_init() -> Plateau:
    return Plateau(jnp.float32(jnp.inf), jnp.int32(0), jnp.float32(1))


def plateau_update(plateau: Plateau, loss, *, factor: float, patience: int) -> Plateau:
    """Multiplies scale by factor after patience + 1 evaluations without a lower loss.

    They are in a row; NaN is no lower. It is PyTorch's ReduceLROnPlateau without its
    threshold.
    """
    loss = jnp.asarray(loss, jnp.float32)
    # A comparison with NaN is false: such a loss counts as one without improvement.
    better = loss < plateau.best
    bad_count = jnp.where(better, 0, plateau.bad_count + 1)
    reduce = bad_count > patience
    return Plateau(
        best=jnp.where(better, loss, plateau.best),
        bad_count=jnp.where(reduce, 0, bad_count).astype(jnp.int32),
        scale=jnp.where(reduce, plateau.scale * factor, plateau.scale),
    )


# Optimizers -------------------------------------------------------------------------


def build(config, matrices: Callable = of_two_axes) -> optax.GradientTransformation:
    """Returns the optimizer of the `optimizer` section, without the learning rate.

    Its updates point uphill: the caller adds -rate * updates. matrices: of the model,
    which says what its matrices are.
    """
    make = OPTIMIZERS[config.name]
    # Clipping comes first, by the norm over all parameters, as in the originals (0.25).
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(*clip, *make(config, matrices))


def _scale_by_adam(config) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)


def _decay(config) -> optax.GradientTransformation:
    # Joins after the moments (Loshchilov & Hutter 2019); the rate scales both.
    return optax.add_decayed_weights(config.weight_decay, decay_mask)


def _adam(config, matrices):
    return [_scale_by_adam(config)]


def _adamw(config, matrices):
    return [_scale_by_adam(config), _decay(config)]


def _lamb(config, matrices):
    # The trust ratio is of the update with its decay (You et al. 2020).
    return [*_adamw(config, matrices), scale_by_layer_trust_ratio()]


def _muon(config, matrices):
    return [by_matrix.muon(config, matrices), _decay(config)]


def _adafactor(config, matrices):
    return [by_matrix.scale_by_adafactor(matrices), _decay(config)]


def lamb_sha_rnn(config, matrices=None) -> list[optax.GradientTransformation]:
    """The fork of LAMB that SHA-RNN was trained with (Merity 2019).

    Moments are not corrected for their start at zero, min(|p|, 10) / |update| is
    floored at min_trust, and weight decay spares nothing. Its epsilon was 1e-6, its
    weight decay 1.2e-6, its min_trust 0.25.
    """
    return [
        _scale_by_uncorrected_adam(b1=config.b1, b2=config.b2, epsilon=config.epsilon),
        optax.add_decayed_weights(config.weight_decay),
        scale_by_layer_trust_ratio(
            min_trust=config.min_trust, max_norm=SHA_RNN_MAX_NORM
        ),
    ]


def _sgd(config, matrices):
    inner = optax.trace(config.momentum) if config.momentum else optax.identity()
    return [_after_decay(config.weight_decay, inner)]


def _after_decay(
    weight_decay: float, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Decay as a part of the gradient, before momentum; of all parameters, as torch's.

    Not a stage of its own in the chain, whose state would have another form with it.
    """

    def update_fn(updates, state, params=None):
        if weight_decay:
            updates = jax.tree.map(lambda g, p: g + weight_decay * p, updates, params)
        return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update_fn)


OPTIMIZERS = {
    "adam": _adam,
    "adamw": _adamw,
    "lamb": _lamb,
    "lamb_sha_rnn": lamb_sha_rnn,
    "sgd": _sgd,
    "nt_asgd": _sgd,  # Its average is that of averaging.py.
    "muon": _muon,
    "adafactor": _adafactor,
}


def decay_mask(params):
    """True for weights: matrices (or more) within one layer that are no biases.

    Those of attention are matrices, [H, K] and [distances, H].
    """

    def decays(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.ndim(x) - is_stacked(path) >= 2 and not name.endswith(BIASES)

    return jax.tree_util.tree_map_with_path(decays, params)


def scale_by_layer_trust_ratio(
    *, min_trust: float = 0.0, max_norm: float = float("inf")
) -> optax.GradientTransformation:
    """LAMB's |p| / |update| (1 where either is 0), one ratio per layer of a stack.

    optax.scale_by_trust_ratio would take one norm over all layers of a stacked leaf.
    """

    def scale(path, update, param):
        axes = tuple(range(int(is_stacked(path)), update.ndim))
        ratio = trust_ratio(update, param, axes, min_trust=min_trust, max_norm=max_norm)
        return update * ratio.astype(update.dtype)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("LAMB needs params in update(grads, state, params)")
        return jax.tree_util.tree_map_with_path(scale, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def trust_ratio(update, param, axes, *, min_trust: float, max_norm: float) -> jax.Array:
    """min(|p|, max_norm) / |update| over these axes, which stay; not below min_trust.

    1 where either is 0.
    """
    p = jnp.minimum(_norm(param, axes), max_norm)
    u = _norm(update, axes)
    degenerate = (p == 0) | (u == 0)
    # The inner `where` keeps 0 / 0 out: what is not chosen is computed as well.
    trust = jnp.where(degenerate, 1.0, p / jnp.where(degenerate, 1.0, u))
    return jnp.maximum(trust, min_trust)


def _norm(x, axes):
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))


class UncorrectedAdamState(NamedTuple):
    """First and second moments of each parameter; no count, as nothing is corrected."""

    mu: optax.Updates
    nu: optax.Updates


def _scale_by_uncorrected_adam(
    *, b1: float, b2: float, epsilon: float
) -> optax.GradientTransformation:
    def init_fn(params):
        return UncorrectedAdamState(
            mu=jax.tree.map(jnp.zeros_like, params),
            nu=jax.tree.map(jnp.zeros_like, params),
        )

    def update_fn(updates, state, params=None):
        del params
        # epsilon outside of the square root, as in Adam and in the fork.
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mu, nu)
        return steps, UncorrectedAdamState(mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)
