"""Reads what torch.save wrote, without PyTorch and without running any of it.

    file = TorchFile("model.pt")
    arrays = file.arrays(file.found)

The file is a zip (since PyTorch 1.6) of stored entries: NAME/data.pkl, a pickle in
which calls rebuild tensors; NAME/data/KEY, the bytes of a storage, which tensors may
share; NAME/byteorder. Before, it was five pickles one behind another, and then the
storages, each after its number of elements. plain_pickle reads the pickles, which may
name what is listed here and nothing else.

Nothing made is larger than the file, but that 16-bit and 8-bit floats become float32:
tensors are views of their storage, each is read once, and a tensor of more elements
than its storage has is refused, and so are too many of one storage.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from xlformer.convert import plain_pickle
from xlformer.convert.plain_values import Call, Name, Pairs
from xlformer.errors import UserError, reason

STATE_DICT_RECIPE = (
    "where the model's code is installed run: model = torch.load('model.pt'); "
    "torch.save(model.state_dict(), 'state.pt')"
)
ZIP = b"PK\x03\x04"
LEGACY = 0x1950A86A20F9469CFC6C, 1001  # what the first two pickles hold
TENSOR, NEW_TENSOR = (
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
)
PARAMETER = "torch._utils._rebuild_parameter"
# What tensors may take that share storages, in sizes of the file: tied ones are there
# twice or thrice, and 16-bit floats become twice as large.
MOST_SHARED = 8
FLOATS = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2".split()
WHOLE = "int64 int32 int16 int8 uint8 bool uint16 uint32 uint64".split()
DTYPES = {
    f"torch.{name}": np.dtype(getattr(ml_dtypes, name, name)) for name in FLOATS + WHOLE
}
_CLASSES = "Double Float Half BFloat16 Long Int Short Char Byte Bool".split()
STORAGES = {
    f"torch.{storage}Storage": DTYPES[f"torch.{name}"]
    for storage, name in zip(_CLASSES, FLOATS[:4] + WHOLE[:6], strict=True)
} | {"torch.storage.UntypedStorage": np.dtype(np.uint8)}
_CALLS = [TENSOR, NEW_TENSOR, PARAMETER, "torch.Size", "torch.device"]
ROLES = {
    **dict.fromkeys([*STORAGES, *DTYPES], plain_pickle.NAME),
    **dict.fromkeys(_CALLS, plain_pickle.CALL),
    "collections.OrderedDict": plain_pickle.PAIRS,
    "collections.Counter": plain_pickle.PAIRS,
}


class Storage(NamedTuple):
    """The bytes of some tensors: where they are, and what they are of."""

    key: str
    dtype: np.dtype
    size: int  # in elements


class TorchFile:
    """A file of torch.save: `found` is what plain_pickle makes of its object.

    Args:
      path: of the file.
      classes: full names of classes whose objects it may have, as Instance.

    Raises:
      UserError: it is missing, damaged, or names what is not listed.
    """

    def __init__(self, path: str | pathlib.Path, classes: tuple[str, ...] = ()):
        self.path = pathlib.Path(path)
        self._roles = ROLES | dict.fromkeys(classes, plain_pickle.INSTANCE)
        self._storages: dict[str, Storage] = {}
        self._starts: dict[str, int] = {}  # where there is no zip
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            with open(self.path, "rb") as file:
                self._zipped = file.read(len(ZIP)) == ZIP
                self.found = self._zip(file) if self._zipped else self._legacy(file)
        except plain_pickle.UnknownName as error:
            raise UserError(
                f"{path} is not a state dict, and a pickled module could run any code; "
                f"{STATE_DICT_RECIPE} ({str(error).partition(',')[0]})"
            ) from error
        # A hostile zip can raise anything: zlib.error, NotImplementedError, struct's.
        except Exception as error:
            raise UserError(
                f"{path} is not a readable file of torch.save: {reason(error)}"
            ) from error

    def _zip(self, file: BinaryIO):
        with _entries(file) as (archive, entries):
            # Early versions have no such entry.
            order = entries.get("byteorder")
            if order and (order := archive.read(order)) != b"little":
                raise ValueError(f"its byteorder is {order[:20]!r}, not little")
            data = archive.read(entries["data.pkl"])
        return plain_pickle.parse(data, self._roles, persistent=self._storage)[0]

    def _legacy(self, file: BinaryIO):
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at = 0
            for number in LEGACY:
                head, at = plain_pickle.parse(data, {}, at)
                if head != number:
                    raise ValueError("it begins as no such file")
            head, at = plain_pickle.parse(data, {}, at)
            if not isinstance(head, Pairs) or ("little_endian", True) not in list(head):
                raise ValueError("its numbers are not little-endian")
            found, at = plain_pickle.parse(data, self._roles, at, self._storage)
            keys, at = plain_pickle.parse(data, {}, at)
            if not isinstance(keys, list) or len(keys) != len(self._storages):
                raise ValueError("its storages are not those of its tensors")
            for key in keys:
                storage = self._storages.get(key) if isinstance(key, str) else None
                size = int.from_bytes(data[at : at + 8], "little")
                if storage is None or size != storage.size or key in self._starts:
                    raise ValueError("its storages are not those of its tensors")
                self._starts[key] = at + 8
                at += 8 + size * storage.dtype.itemsize
            if at != len(data):
                raise ValueError(f"{len(data)} bytes, where {at} are named")
        return found

    def _storage(self, given) -> Storage:
        """What stands for ('storage', class, key, device, elements[, no view])."""
        if not isinstance(given, tuple) or len(given) not in (5, 6):
            raise ValueError("an object outside of it that is no storage")
        what, kind, key, _, size, *view = given
        named = isinstance(kind, Name) and kind.name in STORAGES
        plain = type(key) is str and type(size) is int and size >= 0
        if what != "storage" or not named or not plain or view not in ([], [None]):
            raise ValueError("an object outside of it that is no storage")
        found = Storage(key, STORAGES[kind.name], size)
        if self._storages.setdefault(key, found) != found:
            raise ValueError(f"storage {key[:20]!r} is of two kinds")
        return found

    def arrays(self, state: Any) -> dict[str, np.ndarray]:
        """The tensors of a state dict, which is `found` or lies in it.

        Floats of less than 32 bits become float32. Tied tensors share memory. Raises
        UserError where it is no state dict, or its bytes are not there or damaged.
        """
        read: dict[str, tuple[np.dtype, np.ndarray]] = {}
        try:
            pairs = list(state) if isinstance(state, Pairs) else [(None, None)]
            if not all(type(name) is str and _call(x) for name, x in pairs):
                raise UserError(f"{self.path} holds no state dict; {STATE_DICT_RECIPE}")
            with open(self.path, "rb") as file, self._opened(file) as take:
                found = {name: _tensor(_call(x), take, read) for name, x in pairs}
                most = MOST_SHARED * file.seek(0, 2)
            if (total := sum(x.nbytes for x in found.values())) > most:
                raise ValueError(f"{total} bytes of tensors that share storages")
            return found
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.path} holds tensors that are no plain arrays: {reason(error)}"
            ) from error

    @contextlib.contextmanager
    def _opened(self, file: BinaryIO):
        """A function from a Storage to its bytes."""

        def of_file(storage: Storage) -> bytes:
            file.seek(self._starts[storage.key])
            return file.read(storage.size * storage.dtype.itemsize)

        if not self._zipped:
            yield of_file
            return
        with _entries(file) as (archive, entries):
            yield lambda storage: archive.read(entries[f"data/{storage.key}"])


@contextlib.contextmanager
def _entries(file: BinaryIO) -> Iterator[tuple[zipfile.ZipFile, dict]]:
    """The zip and its entries by their names below NAME/. Reading checks the CRC."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        size = file.seek(0, 2)
        # Entries that lie over one another could stand for more than there is.
        if sum(info.file_size for info in infos) > size:
            raise ValueError(f"its entries have more than its {size} bytes")
        for info in infos:
            if info.compress_type or info.compress_size != info.file_size:
                raise ValueError(f"its entry {info.filename[:40]!r} is compressed")
        folders = {info.filename.partition("/")[0] for info in infos}
        entries = {info.filename.partition("/")[2]: info for info in infos}
        if len(folders) != 1 or len(entries) != len(infos) or "data.pkl" not in entries:
            raise ValueError("its entries are not those of one NAME/data.pkl")
        yield archive, entries


def _call(found) -> Call | None:
    """The call that makes a tensor, or the one of a parameter; None of all else."""
    if isinstance(found, Call) and found.name == PARAMETER and found.given:
        found = found.given[0]
    tensor = isinstance(found, Call) and found.name in (TENSOR, NEW_TENSOR)
    return found if tensor else None


def _tensor(call: Call, take: Callable[[Storage], bytes], read: dict) -> np.ndarray:
    """The array of a call, a view of its storage, which is put into `read` once."""
    storage, offset, shape, strides, _, _, *rest = call.given
    dtype = storage.dtype
    if call.name == NEW_TENSOR:
        dtype, *rest = DTYPES[rest[0].name], *rest[1:]
    # They would say that the sign of each number, or its conjugate, is to be taken.
    if rest not in ([], [None]) and not (isinstance(rest[0], Pairs) and not rest[0]):
        raise ValueError("a tensor with attributes")
    numbers = [offset, *shape[:65], *strides[:65]]
    if any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a shape or strides that are none")
    if len(shape) != len(strides) or len(shape) > 64:  # numpy has no more
        raise ValueError(f"a shape of {len(shape)} axes, strides of {len(strides)}")
    if storage.key not in read:
        read[storage.key] = dtype, _numbers(storage, dtype, take(storage))
    known, whole = read[storage.key]
    if known != dtype:
        raise ValueError(f"storage {storage.key[:20]!r} is of two dtypes")
    count = math.prod(shape)
    if not count:
        return np.empty(shape, whole.dtype)
    # In an axis of one element the stride says nothing, and may be anything.
    steps = [k if n > 1 else 0 for n, k in zip(shape, strides, strict=True)]
    last = offset + sum((n - 1) * k for n, k in zip(shape, steps, strict=True))
    if last >= len(whole) or count > len(whole):
        raise ValueError(
            f"a tensor of {count} elements, the last of them number {last}, where its "
            f"storage has {len(whole)}"
        )
    steps = [k * whole.itemsize for k in steps]
    return np.lib.stride_tricks.as_strided(whole[offset:], shape, steps)


def _numbers(storage: Storage, dtype: np.dtype, data: bytes) -> np.ndarray:
    if len(data) != storage.size * storage.dtype.itemsize:
        raise ValueError(
            f"storage {storage.key[:20]!r} has {len(data)} bytes, not {storage.size} "
            f"elements of {storage.dtype.name}"
        )
    whole = np.frombuffer(data, dtype)
    narrow = dtype.name in FLOATS and dtype.itemsize < 4
    return whole.astype(np.float32) if narrow else whole
