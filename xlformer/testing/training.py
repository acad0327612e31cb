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
    SHORT,
    STEP,
    TOLERANCE,
    Case,
    close,
    is_float,
    make_rngs,
    require,
    same,
)

# Rows that are computed without the others: not the first, and not in their order, so
# that a key which is made of a row's place in the call shows.
GROUP = np.array([3, 1])


def _rows(case: Case, rows):
    """Arguments of case.train for some rows, each with the key it has in the batch.

    Without resets and padding.
    """
    inputs_BT, targets_BT = case.at(1)
    state = case.rows(case.warm, rows)
    options = case.options(inputs_BT[rows])
    return inputs_BT[rows], targets_BT[rows], state, *options, make_rngs(1, rows)


def _check_train(case: Case) -> None:
    """A row draws from its own key only; needs_rngs says whether it draws at all."""
    everyone, others = np.arange(ROWS), np.arange(1, ROWS)
    arrays = _rows(case, everyone)
    nll_BT, state, _ = case.train(*arrays)
    # Row 0 gets another token and another key: neither may reach any other row.
    inputs_BT, *same_arrays, rngs = arrays
    inputs_BT = inputs_BT.copy()
    inputs_BT[0] = (inputs_BT[0] + 1) % case.model.vocab_size
    mixed = {**rngs, "rows": make_rngs(1)["rows"][np.array([1, *others])]}
    other_BT, other, _ = case.train(inputs_BT, *same_arrays, mixed)
    found = other_BT[1:], case.rows(other, others)
    expected = nll_BT[1:], case.rows(state, others)
    same("train: others, when row 0 changes", found, expected)
    order = np.array([3, 0, 4, 2, 1])
    permuted_BT, permuted, _ = case.train(*_rows(case, order))
    expected = nll_BT[order], case.rows(state, order)
    close("train: rows in another order", (permuted_BT, permuted), expected)
    drawn_BT, *_ = case.train(*arrays[:-1], make_rngs(5))
    if not case.model.needs_rngs:
        same("train: needs_rngs is False, and another key", drawn_BT, nll_BT)
        return
    scored_BT, _ = case.plain(*arrays[:3])
    for name, x_BT in (("scoring", scored_BT), ("another key", drawn_BT)):
        message = f"train: needs_rngs is True, but {name} gives the same"
        # Not bit for bit: they are different programs.
        require(np.abs(x_BT - nll_BT).max() > TOLERANCE, message)


def _check_hidden(case: Case) -> None:
    """Resets and padding, which are checked as scoring has them, in training too."""
    inputs_BT, targets_BT, warm, *options, rngs = _rows(case, np.arange(ROWS))
    nll_BT, *_ = case.train(inputs_BT, targets_BT, warm, *options, rngs)
    first_BT, *_ = case.train(inputs_BT, targets_BT, case.fresh, *options, rngs)
    rows_B = np.arange(ROWS) % 2 == 0
    resets_BT = np.zeros(inputs_BT.shape, bool)
    resets_BT[rows_B, 0] = True
    options = case.options(inputs_BT, resets_BT)
    reset_BT, *_ = case.train(inputs_BT, targets_BT, warm, *options, rngs)
    expected_BT = np.where(rows_B[:, None], first_BT, nll_BT)
    close("hidden: resets before a segment: nll", reset_BT, expected_BT)
    options = case.options(inputs_BT, None, np.full(ROWS, SHORT))
    padded_BT, *state = case.train(inputs_BT, targets_BT, warm, *options, rngs)
    zeros_BT = np.zeros_like(padded_BT[:, SHORT:])
    same("hidden: padding: nll, 0 where padded", padded_BT[:, SHORT:], zeros_BT)
    other_BT = inputs_BT.copy()
    other_BT[:, SHORT:] = 0
    other = case.train(other_BT, targets_BT, warm, *options, rngs)
    same("hidden: what padding says", list(other), [padded_BT, *state])


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
    inputs_BT, targets_BT, state, *_, rngs = _rows(case, GROUP)
    batch = {"inputs_BT": inputs_BT, "targets_BT": targets_BT, "rows": rngs["rows"]}
    placed = sharding.Rows(mesh, len(GROUP)).shardings(batch)
    state = jax.device_put(state, sharding.model_state(mesh, state, model.state_axes()))

    @jax.jit
    def train(params, batch, state):
        keys = {"dropout": rngs["dropout"], "rows": batch.pop("rows")}
        options = {"step": STEP, "train": True, "rngs": keys}
        return model.apply(params, **batch, state=state, **options)

    with jax.set_mesh(mesh):
        found = train(
            jax.device_put(case.params, params), jax.device_put(batch, placed), state
        )
    expected = case.train(*_rows(case, GROUP))
    close("mesh: of two devices, and one", found, expected)


def _check_float64(case: Case) -> None:
    """The nll in float64 is nearly that of float32 weights in the model's own dtype."""
    _check_rounding(case)
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


def _check_rounding(case: Case) -> None:
    """float64 all the way: the nll has one slope, seen from near and from far.

    Where a number is rounded to float32 on its way, a step of 1e-8 is less than its
    own; where it is rounded to less, 1e-4 is too. A tenth is for kinks, of which a few
    may lie within 1e-4.
    """
    random = np.random.default_rng(2)
    direction = jax.tree.map(
        lambda x: random.normal(size=x.shape) if is_float(x) else 0, case.params
    )

    def nll(size):
        params = jax.tree.map(lambda x, d: x + size * d, case.params, direction)
        return case.plain_of(params, *case.at(0), case.fresh)[0]

    near, far = ((nll(size) - nll(-size)) / (2 * size) for size in (1e-8, 1e-4))
    steepest = max(np.abs(far).max(), np.finfo(float).tiny)
    name = "float64: rounded on its way: share of the slope that"
    close(name, near / steepest, far / steepest, 0.1)


CHECKS = (
    _check_train,
    _check_hidden,
    _check_groups,
    _check_mesh,
    _check_float64,
)
