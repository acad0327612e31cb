"""What is known of a model's parameters without making any: shapes, dtypes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from xlformer.models.base import Model


def compute_dtype(name: str, params=None):
    """The dtype to compute in: float64 if the parameters are, else what `name` says.

    'auto' is bfloat16 where it is native (TPU, compute capability >= 8.0), else
    float32.
    """
    leaves = jax.tree.leaves(params)
    # Whatever the config says: parity with the originals and `check_model` are tested
    # in float64, also for configs that ask for bfloat16.
    if any(leaf.dtype == jnp.float64 for leaf in leaves):
        return jnp.dtype("float64")
    if name != "auto":
        return jnp.dtype(name)
    device = jax.devices()[0]  # All devices of a job are of one kind.
    native = device.platform == "tpu"
    if device.platform == "gpu":
        # NVIDIA's is a number; AMD's, such as gfx90a, says nothing of bfloat16.
        major, _, _ = str(device.compute_capability).partition(".")
        native = major.isdecimal() and int(major) >= 8
    return jnp.dtype(jnp.bfloat16 if native else jnp.float32)


def abstract_params(model: Model):
    """The shapes of what `init` gives; nothing is made.

    They are kept for equal models: to trace `init` takes 0.1 s of a small one, and a
    run that is loaded and scored asks three times.
    """
    # Nobody gets the containers of another one.
    return jax.tree.map(lambda x: x, _abstract_params(model, jax.config.jax_enable_x64))


@functools.lru_cache(maxsize=64)
def _abstract_params(model: Model, x64: bool):
    return jax.eval_shape(model.init, jax.random.key(0))
