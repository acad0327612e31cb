"""Reads TensorFlow's checkpoints of format V2 without TensorFlow.

    bundle = tensor_bundle.open_bundle("model.ckpt-4000")
    x = bundle.read("transformer/r_w_bias")

PREFIX.index is a table in LevelDB's layout (leveldb.py). Key '' holds the header, every
other key is a variable's name; its value, a protocol buffer, says where in
PREFIX.data-SSSSS-of-NNNNN its numbers lie. A variable that was saved in parts has an
entry with the parts' extents, and entries of theirs under keys that `_part_key` makes.

The files are a stranger's: each offset, size and count is held against what is there
before it is used, and each block and array against its checksum.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from xlformer.convert import leveldb
from xlformer.convert.crc32c import crc32c, masked
from xlformer.errors import UserError

MOST_SHARDS = 100_000
# The dtypes of checkpoints by their numbers there; bfloat16 is read as its bits.
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "<u1", 5: "<i2", 6: "<i1", 9: "<i8"}
DTYPES |= {10: "?", 14: "<u2", 17: "<u2", 19: "<f2", 22: "<u4", 23: "<u8"}
BFLOAT16 = 14


class Variable(NamedTuple):
    """An entry of the index: where the numbers of a variable, or of a part, lie.

    Attributes:
      dtype: TensorFlow's number of it.
      shape: of all of it.
      shard, offset, size: where the bytes are.
      crc: their masked checksum.
      parts: (start, length) of each axis of each part, if it was saved in parts.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    parts: tuple[tuple[tuple[int, int], ...], ...] = ()


class Bundle:
    """A checkpoint: the variables of its index, and their numbers on demand."""

    def __init__(self, prefix: pathlib.Path, shards: int, variables: dict):
        self.prefix, self._shards = prefix, shards
        self._parts = {k: v for k, v in variables.items() if k[:1] == b"\0"}
        # Names are UTF-8 in what TensorFlow writes; of others only that they differ.
        self.variables: dict[str, Variable] = {
            key.decode("utf-8", "backslashreplace"): variable
            for key, variable in variables.items()
            if key[:1] != b"\0"
        }
        self._check_sizes(variables)

    def shard(self, number: int) -> pathlib.Path:
        """The file of a shard."""
        name = f"{self.prefix.name}.data-{number:05}-of-{self._shards:05}"
        return self.prefix.with_name(name)

    def _check_sizes(self, variables: dict[bytes, Variable]) -> None:
        """Holds all bytes that the entries claim against those that there are.

        TensorFlow stores nothing twice, so that a small file with many entries cannot
        become a large model.
        """
        claimed: dict[int, int] = {}
        for variable in variables.values():
            claimed[variable.shard] = claimed.get(variable.shard, 0) + variable.size
        for number, size in sorted(claimed.items()):
            path = self.shard(number)
            if not 0 <= number < self._shards:
                line = f"{self.prefix}.index: shard {number} of {self._shards}"
                raise UserError(line)
            if not path.is_file():
                raise UserError(f"{path}: no such file, and {self.prefix}.index has it")
            if path.stat().st_size < size:
                raise UserError(
                    f"{path} has {path.stat().st_size} bytes, and {self.prefix.name}"
                    f".index says {size}: it is cut short or of another checkpoint"
                )

    def read(self, name: str) -> np.ndarray:
        """The numbers of a variable; halves and bfloat16 widened to float32."""
        variable = self.variables[name]
        if variable.dtype not in DTYPES:
            line = f"{name} holds no numbers (dtype {variable.dtype})"
            raise UserError(f"{self.prefix}.index: {line}")
        if not variable.parts:
            return self._array(name, variable)
        dtype = np.float32 if variable.dtype == BFLOAT16 else DTYPES[variable.dtype]
        dtype = np.float32 if dtype == "<f2" else dtype
        pieces = []
        for part in variable.parts:
            lengths = zip(part, variable.shape, strict=True)
            shape = tuple(dim if n < 0 else n for (_, n), dim in lengths)
            found = self._parts.get(_part_key(name, part))
            if found is None or found.parts or found.shape != shape:
                raise UserError(f"{self.prefix}.index lacks a part of {name}")
            if found.dtype != variable.dtype:
                raise UserError(f"{self.prefix}.index: {name} has parts of two dtypes")
            pieces.append((part, shape, found))
        whole = np.empty(variable.shape, dtype)
        for part, shape, found in pieces:
            place = tuple(
                slice(start, start + n)
                for (start, _), n in zip(part, shape, strict=True)
            )
            whole[place] = self._array(f"a part of {name}", found)
        return whole

    def _array(self, name: str, variable: Variable) -> np.ndarray:
        path = self.shard(variable.shard)
        try:
            data = np.fromfile(path, np.uint8, variable.size, offset=variable.offset)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if data.size != variable.size:
            end = variable.offset + variable.size
            raise UserError(f"{path} ends before byte {end}, the end of {name}")
        if masked(crc32c(data)) != variable.crc:
            raise UserError(
                f"{path}: {name} is not what was saved: its checksum differs"
            )
        found = data.view(DTYPES[variable.dtype]).reshape(variable.shape)
        if variable.dtype == BFLOAT16:
            return (found.astype(np.uint32) << 16).view(np.float32)
        return found.astype(np.float32) if found.dtype == np.float16 else found


def open_bundle(prefix: str | pathlib.Path) -> Bundle:
    """Reads PREFIX.index; UserError where it, or a shard that it has, is not whole."""
    prefix = pathlib.Path(prefix)
    path = prefix.with_name(f"{prefix.name}.index")
    try:
        if not path.is_file():
            raise FileNotFoundError
        size = path.stat().st_size
        if size > leveldb.MOST:
            raise ValueError(f"{size} bytes, more than {leveldb.MOST}")
        entries = dict(leveldb.table(path.read_bytes()))
        shards = _header(entries.pop(b"", None))
        variables = {}
        for key, value in entries.items():
            variables[key] = _variable(key, value)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not the index of a TensorFlow checkpoint (V2): {error}"
        ) from error
    return Bundle(prefix, shards, variables)


# Its values ---------------------------------------------------------------------------


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protocol buffer: whole numbers, or bytes."""
    at = 0
    while at < len(data):
        tag, at = leveldb.varint(data, at, len(data))
        if tag & 7 == 0:
            value, at = leveldb.varint(data, at, len(data))
            value -= (value >> 63 & 1) << 64  # Negative ones are 64 bits long.
        else:
            if tag & 7 == 2:
                size, at = leveldb.varint(data, at, len(data))
            else:
                size = {1: 8, 5: 4}.get(tag & 7, len(data) + 1)
            if size > len(data) - at:
                raise ValueError("a field that is not all there")
            value, at = data[at : at + size], at + size
        yield tag >> 3, value


def _typed(data: bytes, kinds: dict[int, type]) -> Iterator[tuple[int, Any]]:
    for number, value in _fields(data):
        if number in kinds:
            if not isinstance(value, kinds[number]):
                raise ValueError(f"field {number} is of another type")
            yield number, value


def _header(data: bytes | None) -> int:
    """The number of shards."""
    if data is None:
        raise ValueError("it has no header")
    found = dict(_typed(data, {1: int, 2: int, 3: bytes}))
    shards, version = found.get(1, 1), dict(_typed(found.get(3, b""), {2: int}))
    if found.get(2, 0):
        raise ValueError("its numbers are of a machine with the highest byte first")
    if version.get(2, 0) > 1:
        raise ValueError(f"its format is {version[2]}, and 1 is read here")
    if not 1 <= shards <= MOST_SHARDS:
        raise ValueError(f"it has {shards} shards")
    return shards


def _variable(key: bytes, data: bytes) -> Variable:
    kinds = {1: int, 2: bytes, 3: int, 4: int, 5: int, 6: bytes, 7: bytes}
    single: dict[int, Any] = {}
    parts = []
    for number, value in _typed(data, kinds):
        if number == 7:
            parts.append(tuple(_extents(value)))
        else:
            single[number] = value
    shape = tuple(
        dict(_typed(dim, {1: int})).get(1, 0)
        for _, dim in _typed(single.get(2, b""), {2: bytes})
    )
    found = Variable(
        single.get(1, 0),
        shape,
        single.get(3, 0),
        single.get(4, 0),
        single.get(5, 0),
        int.from_bytes(single.get(6, b""), "little"),
        tuple(parts),
    )
    _check(repr(key.decode("utf-8", "backslashreplace"))[:80], found)
    return found


def _check(name: str, found: Variable) -> None:
    # An axis of zero makes nothing small that numpy has no place for.
    least, most = min((*found.shape, 0)), math.prod(max(dim, 1) for dim in found.shape)
    if (
        min(least, found.offset, found.size) < 0
        or most >= 1 << 48
        or (len(found.shape) > 32)
    ):
        raise ValueError(f"{name} has shape {found.shape} at byte {found.offset}")
    if found.dtype in DTYPES and not found.parts:
        size = math.prod(found.shape) * np.dtype(DTYPES[found.dtype]).itemsize
        if size != found.size:
            raise ValueError(
                f"{name} has shape {found.shape}, and {found.size} bytes for it"
            )
    if found.parts and (found.size or found.dtype not in DTYPES):
        raise ValueError(f"{name} is saved in parts, and has {found.size} bytes itself")
    if found.parts and not _follow(found.parts, found.shape):
        raise ValueError(f"{name} has parts that do not make up {found.shape}")


def _follow(parts, shape: tuple[int, ...]) -> bool:
    """Whether parts follow each other along one axis, as TensorFlow cuts a variable."""
    if not shape or any(len(part) != len(shape) for part in parts):
        return False
    whole = tuple((0, dim) for dim in shape)
    found = sorted(
        tuple(w if x[1] < 0 else x for x, w in zip(part, whole, strict=True))
        for part in parts
    )
    cut = {axis for p in found for axis, w in enumerate(whole) if p[axis] != w}
    axis, end = min(cut, default=0), 0
    for part in found:
        start, length = part[axis]
        if start != end:
            return False
        end += length
    return len(cut) <= 1 and end == shape[axis]


def _extents(data: bytes) -> Iterator[tuple[int, int]]:
    """(start, length) of each axis; a length of -1 is all of it."""
    for _, extent in _typed(data, {1: bytes}):
        found = dict(_typed(extent, {1: int, 2: int}))
        yield found.get(1, 0), found.get(2, -1)


def _part_key(name: str, part: tuple[tuple[int, int], ...]) -> bytes:
    """The key of a part, in TensorFlow's encoding that sorts as numbers do."""
    escaped = name.encode().replace(b"\xff", b"\xff\0").replace(b"\0", b"\0\xff")
    rank = bytes([1, len(part)]) if part else b"\0"
    numbers = b"".join(_ordered(n) for extent in part for n in extent)
    return b"\0" + escaped + b"\0\1" + rank + numbers


def _ordered(number: int) -> bytes:
    """A signed number: as many ones ahead as it has bytes, turned over if negative."""
    size = next(n for n in range(1, 11) if -1 << 7 * n - 1 <= number < 1 << 7 * n - 1)
    ones = ((1 << size) - 1 << 8 * size - size) if size < 10 else 0x3FF << 70
    return (number % (1 << 8 * size) ^ ones).to_bytes(size, "big")
