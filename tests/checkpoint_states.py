"""States and checkpoints that checkpoints_test.py and integrity_test.py share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xlformer.runs.checkpoints import Checkpoints

CONFIG = {"name": "test", "model": {"d_model": 5, "cutoffs": [2, 3]}}


class State(NamedTuple):
    """A little of everything: a step, stacks, tuples, None, empty arrays, a key."""

    step: Any
    params: Any
    opt_state: Any
    carried: Any
    flags: Any


def make_state(step):
    key = jax.random.key(step)
    return State(
        step=jnp.int32(step),
        params={
            # Over 1 KiB: smaller arrays lie in a node that has a checksum of its own.
            "layers": {"kernel": jax.random.normal(key, (3, 8, 61))},
            "bias": jnp.arange(8, dtype=jnp.bfloat16) + step,
        },
        opt_state=(None, {"mu": jnp.full((8,), step, jnp.float32)}, ()),
        carried={"hidden_LBMD": jnp.zeros((3, 8, 0, 5)), "key": key},
        flags=jnp.array([True, False, True]),
    )


def abstract_state():
    return jax.eval_shape(lambda: make_state(0))


def data(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(data(x), data(y))


def save_all(directory, steps, metrics=None, **kwargs):
    with Checkpoints(directory, **kwargs) as checkpoints:
        for step in steps:
            metric = (metrics or {}).get(step)
            assert checkpoints.save(
                step, make_state(step), config=CONFIG, metric=metric
            )


def on_mesh(tree, shape, names):
    """Leaves as abstract arrays, sharded over as many axes as divide their shape."""
    mesh = Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), names)

    def place(x):
        axes = [
            names[0] if n and n % shape[0] == 0 and i == x.ndim - 2 else None
            for i, n in enumerate(x.shape)
        ]
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def sharded_state(step):
    abstract = on_mesh(abstract_state(), (4, 2), ("data", "fsdp"))
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda: make_state(step), out_shardings=shardings)()
