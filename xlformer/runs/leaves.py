"""A state as named leaves: paths, layouts, the form on disk, and a digest of each.

The digest is the same on any number of devices: the sum over elements of (bits as
uint32) * (odd weight of the element's position), modulo 2^32. The weight is odd, so any
one flipped bit changes the sum, and a sum over a sharded array is a sum of sums. It
catches accidents; it is no cryptographic hash.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

# 2^32 / golden ratio, the odd number of Knuth's multiplicative hashing: it spreads
# neighbouring positions. Digests of saved checkpoints depend on it.
GOLDEN = 2654435761
# Words that numpy sums at a time: what it makes of them stays in the cache.
BLOCK = 1 << 16


def flatten(tree) -> dict[str, Any]:
    """Returns {path: leaf}, as 'params/layers/w', of any mixture of dicts, dataclasses
    and tuples. None has no leaf.

    Paths are what a checkpoint knows of a tree: no class of ours is written into it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


def is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def layout(x) -> str:
    """'float32[3,4]': what must agree for a leaf to be restored into another."""
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def layouts(tree) -> dict[str, str]:
    """{path: layout} of a tree of arrays or shapes."""
    return {path: layout(x) for path, x in flatten(tree).items()}


def nest(flat: Mapping[str, object]) -> dict:
    """{'a/b': x} as {'a': {'b': x}}: the tree that is written, whatever its classes."""
    root = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return root


def to_disk(flat: Mapping[str, object]) -> dict[str, object]:
    """What is written: PRNG keys as their data, without empty arrays.

    Orbax refuses arrays of no elements. Takes arrays or jax.ShapeDtypeStructs.
    """
    return {k: _key_data(x) if is_key(x) else x for k, x in flat.items() if x.size}


def _key_data(x):
    if isinstance(x, jax.Array):
        return jax.random.key_data(x)
    data = jax.eval_shape(jax.random.key_data, x)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)


def from_disk(value, like):
    """Undoes to_disk for one leaf; value is None for an empty array."""
    if is_key(like):
        impl = []  # only a traced key tells its implementation, not its abstract form
        jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), like)
        return jax.random.wrap_key_data(value, impl=impl[0])
    if like.size:
        return value
    if like.sharding is None:
        return np.zeros(like.shape, like.dtype)
    # By jit, which can also make an array that is spread over several hosts.
    zeros = functools.partial(jnp.zeros, like.shape, like.dtype)
    return jax.jit(zeros, out_shardings=like.sharding)()


def cast(value, like):
    """`value` in the dtype and where `like` wants it."""
    if value.dtype == like.dtype:
        return value
    if like.sharding is None:
        return value.astype(like.dtype)
    turn = jax.jit(lambda x: x.astype(like.dtype), out_shardings=like.sharding)
    return turn(value)


def digests(flat: Mapping[str, object]) -> dict[str, int]:
    """Returns {path: uint32 as int}; all processes must ask for arrays that they share.

    On accelerators one compiled call, one read. What lies on CPU devices is summed by
    numpy, which needs no program to be compiled for each other state (a second each);
    and so are numpy leaves, which may be 64 bits wide where JAX is not.
    """
    on_device = {k: x for k, x in flat.items() if not _on_cpu(x)}
    on_cpu = {k: x for k, x in flat.items() if k not in on_device}
    found: dict[str, int] = {}
    if on_device:
        values = np.asarray(_stacked(list(on_device.values())))
        found |= {k: int(v) for k, v in zip(on_device, values, strict=True)}
    if spread := {k: x for k, x in on_cpu.items() if _is_spread(x)}:
        sums_LC = np.array([_sums(x) for x in spread.values()], np.uint32)
        sums_LC = multihost_utils.process_allgather(sums_LC).sum(0, dtype=np.uint32)
        both = zip(spread.items(), sums_LC, strict=True)
        found |= {k: int(sums_C[_copy(x)]) for (k, x), sums_C in both}
    whole = {k: x for k, x in on_cpu.items() if k not in spread}
    return found | {k: _digest_here(x) for k, x in whole.items()}


def _on_cpu(x) -> bool:
    if not isinstance(x, jax.Array):
        return True
    return all(device.platform == "cpu" for device in x.sharding.device_set)


def _is_spread(x) -> bool:
    """Whether some process has only a part; all processes answer alike."""
    if not isinstance(x, jax.Array):
        return False
    return not (x.is_fully_addressable or x.is_fully_replicated)


def _copy(x) -> int:
    """Which copy of it this process answers for: what it read itself may be damaged."""
    return min((shard.replica_id for shard in x.addressable_shards), default=0)


def _digest_here(x) -> int:
    if not isinstance(x, jax.Array):
        return numpy_digest(np.asarray(x))
    own = _copy(x)
    shards = [shard for shard in x.addressable_shards if shard.replica_id == own]
    return sum(_share(shard, x.shape) for shard in shards) % 2**32


def _sums(x) -> list[int]:
    """This process's share of each copy; of no leaf are there more than devices."""
    sums_C = [0] * jax.device_count()
    for shard in x.addressable_shards:
        sums_C[shard.replica_id] += _share(shard, x.shape)
    return [total % 2**32 for total in sums_C]


def _share(shard, shape) -> int:
    return numpy_digest(np.asarray(shard.data), shard.index, shape)


# One program and one read for all leaves. Of a sharded leaf only a scalar crosses the
# devices: the sum of their sums.
@jax.jit
def _stacked(leaves):
    return jnp.stack([digest(x) for x in leaves])


# Jitted, so that leaves of one layout (a parameter, its moments) are traced once.
@jax.jit
def digest(x) -> jax.Array:
    """The digest of one array, as a uint32."""
    words = _words(x)
    # Row by row, from an index for each axis: to flatten a sharded array would move it.
    position = jnp.uint32(0)
    for axis, size in enumerate(words.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position * jnp.uint32(size) + index
    weight = (position * jnp.uint32(GOLDEN)) | jnp.uint32(1)
    return jnp.sum(words * weight, dtype=jnp.uint32)


def _words(x):
    """The bits as uint32; 64-bit elements become two words on a new last axis."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.iscomplexobj(x):
        return _words(jnp.stack([x.real, x.imag], axis=-1))
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)


def numpy_digest(x: np.ndarray, index=(), shape: tuple[int, ...] = ()) -> int:
    """The digest of a numpy array: the number that `digest` gives for it on a device.

    Of a part of an array of `shape`, the one at `index` (slices, as a Shard has them),
    its share of the sum. The order of bytes within a number is the same in both, little
    endian.
    """
    size = min(x.dtype.itemsize, 4)
    per_element = x.dtype.itemsize // size
    firsts = [s.start or 0 for s in index] or [0] * x.ndim
    rows_R, length = _rows(x.shape, firsts, shape or x.shape)
    words = np.ascontiguousarray(x).reshape(-1)
    words = words.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[size])
    words_RC = words.reshape(rows_R.size, length * per_element)
    rows_R, columns = rows_R * np.uint32(per_element), words_RC.shape[1]
    total, step = 0, max(1, BLOCK // max(1, columns))
    for r in range(0, rows_R.size, step):
        for c in range(0, columns, BLOCK):
            block = words_RC[r : r + step, c : c + BLOCK].astype(np.uint32, copy=False)
            position = np.arange(block.shape[1], dtype=np.uint32) + _wrapped(c)
            weight = (rows_R[r : r + step, None] + position) * np.uint32(GOLDEN)
            total += int(np.sum(block * (weight | np.uint32(1)), dtype=np.uint32))
    return total % 2**32


def _rows(part, firsts, whole) -> tuple[np.ndarray, int]:
    """Where the rows of a part begin in the whole, modulo 2^32, and their length.

    A row is as many of the last axes as lie together in both.
    """
    axis, length = len(part), 1
    while axis and (axis == len(part) or part[axis] == whole[axis]):
        axis -= 1
        length *= part[axis]
    begin = np.zeros(1, np.uint32)
    for i, (first, size) in enumerate(zip(firsts, whole, strict=True)):
        inside = np.arange(part[i] if i < axis else 1, dtype=np.uint32)
        inside += _wrapped(first)
        begin = (begin[:, None] * _wrapped(size) + inside).reshape(-1)
    return begin, length


def _wrapped(n: int) -> np.uint32:
    """n modulo 2^32: a leaf may have more elements, and numpy refuses what is more."""
    return np.uint32(n % 2**32)
