"""Checks of training: what is drawn, and that groups of rows and a mesh do not matter.

A step of training averages the gradients of groups of rows, on several devices and one
group after the other (training/gradients.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from xlformer import sharding
from xlformer.testing.case import (
    ROWS,
    STEP,
    Case,
    close,
    is_float,
    require,
    same,
)

# Rows that are computed without the others: not the first, and not in their order, so
# that a key which is made of a row's place in the call shows.
GROUP = np.array([3, 1])


def _rngs(seed: int, rows=slice(None)) -> dict:
    rows_B = jax.random.split(jax.random.key(seed + 1), ROWS)[rows]
    return {"dropout": jax.random.key(seed), "rows": rows_B}


def _rows(case: Case, rows):
    """Arguments of case.train for some rows, each with the key it has in the batch."""
    inputs_BT, targets_BT = case.at(1)
    state = case.rows(case.warm, rows)
    return inputs_BT[rows], targets_BT[rows], state, _rngs(1, rows)


def _check_train(case: Case) -> None:
    """A row draws from its own key only; needs_rngs says whether it draws at all."""
    everyone, others = np.arange(ROWS), np.arange(1, ROWS)
    arrays = _rows(case, everyone)
    nll_BT, state, _ = case.train(*arrays)
    # Row 0 gets another token and another key: neither may reach any other row.
    inputs_BT, targets_BT, warm, rngs = arrays
    inputs_BT = inputs_BT.copy()
    inputs_BT[0] = (inputs_BT[0] + 1) % case.model.vocab_size
    mixed = {**rngs, "rows": _rngs(1)["rows"][np.array([1, *others])]}
    other_BT, other, _ = case.train(inputs_BT, targets_BT, warm, mixed)
    found = other_BT[1:], case.rows(other, others)
    expected = nll_BT[1:], case.rows(state, others)
    same("train: others, when row 0 changes", found, expected)
    order = np.array([3, 0, 4, 2, 1])
    permuted_BT, permuted, _ = case.train(*_rows(case, order))
    expected = nll_BT[order], case.rows(state, order)
    close("train: rows in another order", (permuted_BT, permuted), expected)
    drawn_BT, *_ = case.train(*arrays[:3], _rngs(5))
    if not case.model.needs_rngs:
        same("train: needs_rngs is False, and another key", drawn_BT, nll_BT)
        return
    scored_BT, _ = case.plain(*arrays[:3])
    for name, x_BT in (("scoring", scored_BT), ("another key", drawn_BT)):
        message = f"train: needs_rngs is True, but {name} gives the same"
        require((x_BT != nll_BT).any(), message)


def _check_groups(case: Case) -> None:
    """Rows in a group give what they give in the batch, and aux is a mean over rows."""
    nll_BT, state, _ = case.train(*_rows(case, np.arange(ROWS)))
    group_BT, after, both = case.train(*_rows(case, GROUP))
    expected = nll_BT[GROUP], case.rows(state, GROUP)
    close("groups: two rows alone", (group_BT, after), expected)
    # A row beside itself gives the mean of two equal numbers, so aux of one row is
    # known without a program of another shape. Of five equal rows a mean is the same,
    # and a sum is not.
    one, other = (case.train(*_rows(case, np.repeat(row, 2)))[2] for row in GROUP)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, one, other)
    close("groups: aux of two rows, and the mean of each alone", both, mean)
    five = case.train(*_rows(case, np.repeat(GROUP[0], ROWS)))[2]
    close("groups: aux of five equal rows, and of two", five, one)


def _check_mesh(case: Case) -> None:
    """Rows and, where param_axes says so, parameters are split over two devices."""
    if jax.device_count() < 2:
        return
    # fsdp splits rows and parameters at once. Two rows of different keys on two devices
    # show keys that are made of a device's own rows.
    model, mesh = case.model, sharding.make_mesh({"fsdp": 2})
    model.check_mesh(mesh)
    params = sharding.parameters(mesh, case.params, model.param_axes(case.params))
    inputs_BT, targets_BT, state, rngs = _rows(case, GROUP)
    batch = {"inputs_BT": inputs_BT, "targets_BT": targets_BT, "rows": rngs["rows"]}
    placed = sharding.Rows(mesh, len(GROUP)).shardings(batch)
    state = jax.device_put(state, sharding.model_state(mesh, state, model.state_axes()))

    @jax.jit
    def train(params, batch, state):
        keys = {"dropout": rngs["dropout"], "rows": batch.pop("rows")}
        options = {"step": STEP, "train": True, "rngs": keys}
        return model.apply(params, **batch, state=state, **options)[:2]

    with jax.set_mesh(mesh):
        found = train(
            jax.device_put(case.params, params), jax.device_put(batch, placed), state
        )
    expected = case.train(*_rows(case, GROUP))[:2]
    close("mesh: of two devices, and one", found, expected)


def _check_float64(case: Case) -> None:
    """The nll in float64 is nearly that of float32 weights in the model's own dtype."""
    inputs_BT, targets_BT = case.at(0)
    expected_BT, _ = case.plain(inputs_BT, targets_BT, case.fresh)
    with jax.enable_x64(False):
        params = jax.tree.map(
            lambda x: np.asarray(x, np.float32) if is_float(x) else x, case.params
        )
        state = jax.jit(case.model.init_state, static_argnums=0)(ROWS)
        score = jax.jit(case.model.apply)
        nll_BT, *_ = score(params, inputs_BT, targets_BT, state, step=STEP)
    # bfloat16 keeps 8 bits of a number, so that only what is grossly wrong can show.
    allowed = 0.3 if case.model.dtype(params) == jnp.bfloat16 else 1e-3
    close("float64: nll, and that of float32", nll_BT, expected_BT, allowed)


CHECKS = (_check_train, _check_groups, _check_mesh, _check_float64)
