"""How many bytes a Pallas TPU kernel copies between the memory and the chip.

The compiler's count knows a kernel's operands, each once. The kernel itself copies
blocks: an input's when the grid comes to another one than the step before, an output's
back when it leaves it, and at the end. A block that stays is not copied again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def copied_bytes(
    grid: Sequence[int],
    specs: Mapping[str, Any],
    arrays: Mapping[str, Any],
    *,
    scalars: Sequence[Any] = (),
) -> dict[str, int]:
    """Bytes of each array, as numbers: what a layout in memory adds is not counted.

    Args:
      grid: sizes, the last changes fastest.
      specs: of each input and output its pl.BlockSpec.
      arrays: or their shapes, by the same names.
      scalars: prefetched ones, with their values: index maps get them too.
    """
    places = np.indices(grid).reshape(len(grid), -1)
    found = {}
    for name, spec in specs.items():
        index = jax.vmap(lambda *at, spec=spec: spec.index_map(*at, *scalars))
        blocks = np.stack([np.asarray(i) for i in index(*jnp.asarray(places))], axis=1)
        moves = np.any(blocks[1:] != blocks[:-1], axis=1)
        copied = blocks[np.concatenate([[True], moves])]
        shape, sizes = arrays[name].shape, spec.block_shape
        inside = [  # a block at the edge is copied as far as the array goes
            np.minimum(size or 1, end - at * (size or 1))
            for at, size, end in zip(copied.T, sizes, shape, strict=True)
        ]
        items = int(np.prod(inside, axis=0, dtype=np.int64).sum())
        found[name] = items * arrays[name].dtype.itemsize
    return found
