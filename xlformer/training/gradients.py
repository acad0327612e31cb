"""Gradients of a batch in groups of rows: over a mesh, and over micro-batches.

Rows are independent, so the gradient is a mean over groups of them. Each part of the
mesh's `data` axis computes that of its own rows, one micro-batch after the other, and
one sum at the end is all that crosses the axis. Left to the compiler, every use of a
parameter would be summed by itself: twice for a tied table, and once a micro-batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from xlformer import sharding

DATA = "data"


def make_gradients(loss_fn, *, micro_batches: int, state_axes):
    """Returns gradients(params, carried, batch, key) -> (grads, (carried, metrics)).

    loss_fn(params, carried, batch, rngs) -> (loss, (carried, metrics)) of some rows;
    metrics are scalars, and their means over the groups are returned. Each row draws
    from fold_in(key, row), so that no grouping changes what is dropped.
    """
    grad_fn = jax.grad(loss_fn, has_aux=True)

    def of_rows(params, carried, batch, rows_B, key):
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B)
        split = {"batch": batch, "rows": keys_B}

        def one(carried, split):
            rngs = {"dropout": key, "rows": split["rows"]}
            return grad_fn(params, carried, split["batch"], rngs)

        return _over_micro_batches(
            one, params, carried, split, state_axes, micro_batches
        )

    def gradients(params, carried, batch, key):
        B = batch["inputs_BT"].shape[0]
        arguments = (params, carried, batch, jnp.arange(B), key)
        # Without a mesh, with one device on the axis, or inside a pmap.
        if sharding.free_axes().get(DATA, 1) == 1:
            return of_rows(*arguments)

        def local(*arguments):
            grads, (carried, metrics) = of_rows(*arguments)
            # The mean of means is that of all rows: devices have equally many.
            return lax.pmean(grads, DATA), (carried, lax.pmean(metrics, DATA))

        rows = {name: P(DATA) if jnp.ndim(x) else P() for name, x in batch.items()}
        axes = batch_axis(carried, state_axes)
        states = jax.tree.map(lambda axis: P(*(None,) * axis, DATA), axes)
        # Manual over `data` alone: fsdp and tensor stay the compiler's to split. With
        # check_vma JAX would sum the gradient of each use of a parameter by itself,
        # which is what this function is there to avoid.
        return jax.shard_map(
            local,
            in_specs=(P(), states, rows, P(DATA), P()),
            out_specs=(P(), (states, P())),
            axis_names={DATA},
            check_vma=False,
        )(*arguments)

    return gradients


def batch_axis(carried, axes):
    """Which axis of each leaf of a model's state is the batch."""
    structure = jax.tree.structure(carried)
    names = structure.flatten_up_to(axes)
    return structure.unflatten([n.index("batch") for n in names])


def _over_micro_batches(one, params, carried, split, axes, n):
    """Means over n groups of rows, each with its own part of the state."""
    if n == 1:
        return one(carried, split)

    # Every n-th row: each device then has rows of every group, and none has to move.
    def part(x, axis):
        shape = (*x.shape[:axis], x.shape[axis] // n, n, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

    def join(x, axis):
        x = jnp.moveaxis(x, 0, axis + 1)
        # Not -1, which reshape cannot tell where a model without memory has a state of
        # no elements.
        rows = x.shape[axis] * n
        return x.reshape(*x.shape[:axis], rows, *x.shape[axis + 2 :])

    batch_axes = batch_axis(carried, axes)
    # What has no rows (length, step, the weight of a row) is the same for every group.
    scalars = {k: x for k, x in split["batch"].items() if not jnp.ndim(x)}
    rows = {k: x for k, x in split["batch"].items() if jnp.ndim(x)}
    rows = jax.tree.map(lambda x: part(x, 0), {"batch": rows, "rows": split["rows"]})

    def body(grads, micro):
        carried, rows = micro
        batch = {**rows["batch"], **scalars}
        more, out = one(carried, {"batch": batch, "rows": rows["rows"]})
        return jax.tree.map(jnp.add, grads, more), out

    # The sum is carried in the dtype of the parameters, float32: a scan keeps one
    # gradient and the activations of one group, however many groups there are.
    grads, (carried, metrics) = lax.scan(
        body,
        jax.tree.map(jnp.zeros_like, params),
        (jax.tree.map(part, carried, batch_axes), rows),
    )
    grads = jax.tree.map(lambda g: g / n, grads)
    carried = jax.tree.map(join, carried, batch_axes)
    return grads, (carried, jax.tree.map(jnp.mean, metrics))
