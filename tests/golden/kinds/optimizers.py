"""Optimizers: torch's ASGD with the switch of AWD-LSTM, and the LAMB of SHA-RNN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden.comparison import Comparison
from jax import lax

from xlformer.config import default_config
from xlformer.errors import UserError
from xlformer.training import averaging, optimizers, steps
from xlformer.training.state import TrainState

NAME = "optimizers"


def matches(names, config):
    return {"A", "b", "x0"} <= names or "names" in config and "min_trust" in config


def compare(arrays, config, dtype):
    return (_nt_asgd if "x0" in arrays else _lamb)(arrays, config, dtype)


def _section(**fields):
    section = default_config().optimizer
    with section.ignore_type():
        section.update(clip_norm=0.0, **fields)
    return section


# NT-ASGD ------------------------------------------------------------------------------


def _nt_asgd(arrays, config, dtype):
    for name in ("t0", "lambd"):
        if config.get(name, 0):
            raise UserError(f"config: {name}={config[name]}, and NT-ASGD has 0")
    # That of each step may follow any schedule: it is an input.
    rates = {"constant": arrays["constant/lr"].astype(dtype)}
    if "lens" in arrays:
        rate_N = np.full(len(arrays["lens"]), config["lr"], dtype)
        scaled_N = optimizers.length_scaled(rate_N, arrays["lens"], config["bptt"])
        rates["length_scaled"] = np.asarray(scaled_N, dtype)
    problem = arrays["A"], arrays["b"], arrays["x0"]
    values, gradients = {}, {}
    for case, rate_N in rates.items():
        found = _iterates(*problem, rate_N, config["weight_decay"])
        gradients[f"{case}/grad"] = found.pop("grad")
        values |= {f"{case}/{name}": x for name, x in found.items()}
        values[f"{case}/lr"] = rate_N
    if "trigger/val_losses" in arrays:
        triggered_SN = _triggered(arrays["trigger/val_losses"], config["nonmono"])
        first_S = np.where(triggered_SN.any(1), triggered_SN.argmax(1), -1)
        values["trigger/switch_index"] = first_S
    given = {"A", "b", "x0", "lens", "constant/lr", "trigger/val_losses"}
    return Comparison(values, gradients, given)


@functools.partial(jax.jit, static_argnames="weight_decay")
def _iterates(A, b, x0, rate_N, weight_decay):
    """What each step leaves of a run that has switched before its first."""
    section = _section(name="nt_asgd", weight_decay=weight_decay)
    optimizer = optimizers.build(section)
    average = averaging.init(section.nonmonotone, x0.dtype)
    average = average._replace(triggered=jnp.array(True))
    params = {"x": x0}
    entries = dict.fromkeys(TrainState._fields) | {"params": params, "ema": params}
    entries |= {"opt_state": optimizer.init(params), "averaging": average}

    def loss(params):
        return params["x"] @ A @ params["x"] / 2 - b @ params["x"]

    def step(state, rate):
        grads = jax.grad(loss)(state.params)
        state, _ = steps.moved(state, optimizer, grads, rate)
        return state, {
            "param": state.params["x"],
            "average": state.ema["x"],
            "grad": grads["x"],
            # That of the next step, and of the next iterate in the average.
            "eta_after": averaging.rate(state.averaging, jnp.nan),
            "mu_after": averaging.weight(state.averaging),
        }

    return lax.scan(step, TrainState(**entries), rate_N)[1]


@functools.partial(jax.jit, static_argnames="nonmonotone")
def _triggered(losses_SN, nonmonotone):
    """Whether the parameters are averaged after each of N validations, S times."""
    note = steps.make_evaluated(_section(name="nt_asgd", nonmonotone=nonmonotone))

    def one(average, loss):
        average = note(optimizers.plateau_init(), average, loss, 0)["averaging"]
        return average, average.triggered

    start = averaging.init(nonmonotone, losses_SN.dtype)
    return jax.vmap(lambda losses_N: lax.scan(one, start, losses_N)[1])(losses_SN)


# LAMB ---------------------------------------------------------------------------------


def _lamb(arrays, config, dtype):
    """The rate of a step is an input: schedules are compared with their formulas."""
    b1, b2 = config["betas"]
    section = _section(
        name="lamb_sha_rnn",
        b1=b1,
        b2=b2,
        epsilon=config["eps"],
        weight_decay=config["weight_decay"],
        min_trust=config["min_trust"] or 0.0,
    )
    *before, trusted = optimizers.lamb_sha_rnn(section)
    before, names = optax.chain(*before), config["names"]
    start, target, curvature = (
        {name: jnp.asarray(arrays[f"{part}/{name}"]) for name in names}
        for part in ("start", "target", "curvature")
    )

    def step(carry, rate):
        params, state = carry
        distance = jax.tree.map(jnp.subtract, params, target)
        grads = jax.tree.map(jnp.multiply, curvature, distance)
        updates, state = before.update(grads, state, params)
        scaled, _ = trusted.update(updates, optax.EmptyState(), params)
        norms = jax.tree.map(lambda x: jnp.sqrt((x**2).sum()), (params, updates))
        # What the step was scaled by says it, but not where there was none.
        trust = jax.tree.map(
            lambda u, p: optimizers.trust_ratio(
                u,
                p,
                None,
                min_trust=section.min_trust,
                max_norm=optimizers.SHA_RNN_MAX_NORM,
            ).squeeze(),
            updates,
            params,
        )
        params = jax.tree.map(lambda p, u: p - rate * u, params, scaled)
        found = {"param": params, "m": state[0].mu, "v": state[0].nu, "trust": trust}
        return (params, state), (found, norms)

    carry = start, before.init(start)
    _, (found, norms) = jax.jit(lambda: lax.scan(step, carry, arrays["lr"]))()
    weights, found["step_norm"] = norms
    largest = optimizers.SHA_RNN_MAX_NORM
    found["weight_norm"] = jax.tree.map(lambda x: np.minimum(x, largest), weights)
    values = {f"{part}/{n}": x for part, xs in found.items() for n, x in xs.items()}
    inputs = {f"{p}/{n}" for p in ("start", "target", "curvature") for n in names}
    return Comparison(values, given={"lr", *inputs})
