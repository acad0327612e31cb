"""Optimizers: torch's ASGD with the switch of AWD-LSTM, and the LAMB of SHA-RNN."""

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
    section = _section(
        name="nt_asgd",
        weight_decay=config["weight_decay"],
        nonmonotone=config["nonmono"],
    )
    n = next(len(x) for name, x in arrays.items() if name.endswith("/param"))
    constant_N = np.full(n, config["lr"], dtype)
    rates = {"constant": constant_N}
    if "lens" in arrays:
        rates["length_scaled"] = optimizers.length_scaled(
            constant_N, arrays["lens"], config["bptt"]
        )
    values, gradients = {}, {}
    for case, rate_N in rates.items():
        found = _iterates(section, arrays, jnp.asarray(rate_N, dtype), dtype)
        gradients[f"{case}/grad"] = found.pop("grad")
        values |= {f"{case}/{name}": x for name, x in found.items()}
        values[f"{case}/lr"] = rate_N
    if "trigger/val_losses" in arrays:
        values["trigger/switch_index"] = np.array(
            [_switch(section, losses, dtype) for losses in arrays["trigger/val_losses"]]
        )
    return Comparison(
        values, gradients, given={"A", "b", "x0", "lens", "trigger/val_losses"}
    )


def _iterates(section, arrays, rate_N, dtype):
    """What each step of a run that has switched at its start leaves."""
    optimizer = optimizers.build(section)
    A, b = arrays["A"], arrays["b"]
    params = {"x": jnp.asarray(arrays["x0"])}
    switched = averaging.init(section.nonmonotone, dtype)
    switched = switched._replace(triggered=jnp.array(True))
    entries = dict.fromkeys(TrainState._fields)
    entries |= {"params": params, "ema": params, "averaging": switched}
    start = TrainState(**entries | {"opt_state": optimizer.init(params)})

    def step(state, rate):
        grads = jax.grad(lambda p: p["x"] @ A @ p["x"] / 2 - b @ p["x"])(state.params)
        state, _ = steps.moved(state, optimizer, grads, rate)
        return state, {
            "param": state.params["x"],
            "average": state.ema["x"],
            "grad": grads["x"],
            # That the next step will have, and the next iterate in the average.
            "eta_after": averaging.rate(state.averaging, jnp.nan),
            "mu_after": averaging.weight(state.averaging),
        }

    return jax.jit(lambda: lax.scan(step, start, rate_N))()[1]


def _switch(section, losses_N, dtype):
    """The index of the evaluation after which the parameters are averaged; -1: none."""
    note = steps.make_evaluated(section)

    def one(average, loss):
        noted = note(optimizers.plateau_init(), average, loss, 0)
        return noted["averaging"], noted["averaging"].triggered

    start = averaging.init(section.nonmonotone, dtype)
    _, triggered_N = jax.jit(lambda: lax.scan(one, start, losses_N))()
    return np.argmax(triggered_N) if np.any(triggered_N) else -1


# LAMB ---------------------------------------------------------------------------------


def _lamb(arrays, config, dtype):
    """The rate of a step is an input: schedules are compared with their formulas."""
    b1, b2 = config["betas"]
    section = _section(
        b1=b1, b2=b2, epsilon=config["eps"], weight_decay=config["weight_decay"]
    )
    *before, trusted = optimizers.lamb_sha_rnn(section, config["min_trust"] or 0.0)
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
        norms = jax.tree.map(
            lambda x: jnp.sqrt((x**2).sum()), (params, updates, scaled)
        )
        params = jax.tree.map(lambda p, u: p - rate * u, params, scaled)
        found = {"param": params, "m": state[0].mu, "v": state[0].nu}
        return (params, state), (found, norms)

    carry = start, before.init(start)
    _, (found, norms) = jax.jit(lambda: lax.scan(step, carry, arrays["lr"]))()
    weights, found["step_norm"], scaled = norms
    largest = optimizers.SHA_RNN_MAX_NORM
    found["weight_norm"] = jax.tree.map(lambda x: np.minimum(x, largest), weights)
    found["trust"] = jax.tree.map(np.divide, scaled, found["step_norm"])
    values = {f"{part}/{n}": x for part, xs in found.items() for n, x in xs.items()}
    inputs = {f"{p}/{n}" for p in ("start", "target", "curvature") for n in names}
    return Comparison(values, given={"lr", *inputs})
