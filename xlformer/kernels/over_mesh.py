"""A kernel on a mesh: each device runs it on its own rows and heads.

The compiler can split its own operations, but no kernel.
"""

from __future__ import annotations

import math

import jax

from xlformer import sharding


def over_mesh(function, arrays: dict, names: dict, *, like: str):
    """Calls function(arrays) on each device, with its part of them by sharding.RULES.

    The gradient of an array that has no part of its own on some axis, as the distances
    have none on the rows, is summed over that axis.

    Args:
      function: of a dict of arrays; returns one array.
      arrays: by name.
      names: of the axes of each, as for sharding.constrain; may hold more than arrays.
      like: the array that the result is split like.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Axes of one device too: beside an axis left to the compiler no kernel may stand.
    free = sharding.free_axes()
    # On one device there is nothing to split: the kernel is called as it is.
    if not free or math.prod(mesh.shape.values()) == 1:
        return function(arrays)
    specs = {k: sharding.spec(x.shape, names[k], free) for k, x in arrays.items()}
    return jax.shard_map(
        function,
        in_specs=(specs,),
        out_specs=specs[like],
        axis_names=set(free),
        # The check would need to know over which axes a kernel's results vary, which a
        # pallas_call does not say.
        check_vma=False,
    )(arrays)


def attention_over_mesh(
    function, qu_BTHK, qw_BTHK, k_BSHK, v_BSHK, r_SHK, visibility, seeds_BH2
):
    """Calls `function` with a dict of qu, qw, k, v, r, start and seeds.

    What is None is left out. Rows and heads are split; all devices have the distances
    of their heads.
    """
    arrays = {
        "qu": qu_BTHK,
        "qw": qw_BTHK,
        "k": k_BSHK,
        "v": v_BSHK,
        "r": r_SHK,
        "start": visibility.key_start_BT,
        "seeds": seeds_BH2,
    }
    split = ("batch", None, "heads", None)
    names = dict.fromkeys(("qu", "qw", "k", "v"), split) | {
        # No axis of the batch: the gradient of the distances is summed over the rows'
        # devices by shard_map's own transposition.
        "r": (None, "heads", None),
        "start": ("batch", None),
        "seeds": ("batch", "heads", None),
    }
    arrays = {name: x for name, x in arrays.items() if x is not None}
    return over_mesh(function, arrays, names, like="qu")
