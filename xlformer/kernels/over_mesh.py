"""A kernel on a mesh: each device runs it on its own rows and heads.

The compiler can split its own operations, but no kernel.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType

from xlformer import sharding


def over_mesh(function, arrays: dict, names: dict, *, like: str):
    """function(arrays), each device with its part of them, by sharding.RULES.

    The gradient of an array that has no part of its own on some axis, as the distances
    have none on the rows, is summed over that axis.

    Args:
      function: of a dict of arrays; returns one array.
      arrays: by name.
      names: of the axes of each, as for sharding.constrain; may hold more than arrays.
      like: the array that the result is split like.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # Axes of one device too: beside an axis left to the compiler no kernel may stand.
    free = {a: mesh.shape[a] for a, t in types.items() if t == AxisType.Auto}
    if not free or math.prod(mesh.shape.values()) == 1:
        return function(arrays)
    specs = {k: sharding.spec(x.shape, names[k], free) for k, x in arrays.items()}
    return jax.shard_map(
        function,
        in_specs=(specs,),
        out_specs=specs[like],
        axis_names=set(free),
        check_vma=False,  # kernels do not say over which axes their results vary
    )(arrays)
