"""Other programs' weight files, none of which can run code.

npz (allow_pickle=False), safetensors, and PyTorch state dicts (convert/torch_file.py,
which needs no PyTorch). A pickled module is refused.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from xlformer import strangers
from xlformer.convert.torch_file import TorchFile
from xlformer.errors import UserError, reason, some

MOST = 1 << 26  # bytes of arrays however packed
MOST_PACKED = 16  # Weights are packed to nine tenths.


def read_state(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict | None]:
    """Reads names and arrays of a .npz, .safetensors, .pt or .bin file.

    Returns:
      The arrays by name, and the hparams if the file carries them (an npz with an entry
      `config` of JSON bytes and its arrays under `params/`).

    Raises:
      UserError: the file is missing, truncated, hostile or of another kind.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    readers = {
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
        ".pt": _read_torch,
        ".bin": _read_torch,
    }
    if path.suffix not in readers:
        raise UserError(f"{path}: the name must end in {', '.join(readers)}")
    return readers[path.suffix](path)


def read_json(path: pathlib.Path) -> dict:
    """Reads a JSON object; anything else is a UserError."""
    try:
        found = strangers.read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    return _object(found, path)


def _object(found, where) -> dict:
    if not isinstance(found, dict):
        raise UserError(
            f"{where} holds a JSON {type(found).__name__}, expected an object"
        )
    return found


def _read_npz(path):
    try:
        # NpzFile, not np.load, which goes by what a file begins with and would take an
        # npy or a pickle of the same name.
        with np.lib.npyio.NpzFile(path, allow_pickle=False) as arrays:
            _check_sizes(path, arrays.zip)
            state = dict(arrays)
            # numpy reads as far as an entry's header says, which may be before the end,
            # and only there the checksum is compared.
            if bad := arrays.zip.testzip():
                raise ValueError(f"{bad} is damaged")
            if not all(isinstance(x, np.ndarray) for x in state.values()):
                raise ValueError("an entry is no array")
    # A hostile file can raise anything: zlib.error, MemoryError, NotImplementedError.
    except Exception as error:
        raise UserError(
            f"{path} is not a readable npz of plain arrays: {reason(error)}"
        ) from error
    hparams = None
    if "config" in state:
        try:
            hparams = json.loads(state.pop("config").tobytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: entry 'config' is not JSON: {error}") from error
        hparams = _object(hparams, f"{path}: entry 'config'")
        prefix = "params/"
        state = {k[len(prefix) :]: x for k, x in state.items() if k.startswith(prefix)}
    return state, hparams


def _check_sizes(path: pathlib.Path, entries: zipfile.ZipFile) -> None:
    """Raises ValueError where a small file would become large arrays.

    Zeros are packed a thousand times over, and entries may share what they unpack.
    """
    infos = entries.infolist()
    # A damaged list of entries is read as a shorter one; its end says how many.
    with path.open("rb") as file:
        file.seek(-22, os.SEEK_END)
        end = file.read()
    count = int.from_bytes(end[10:12], "little")
    if not infos or end[:4] != b"PK\5\6" or count not in (len(infos), 0xFFFF):
        raise ValueError(f"{len(infos)} entries are found, not those that its end says")
    claimed = sum(entry.file_size for entry in infos)
    size = path.stat().st_size
    if claimed > max(MOST, MOST_PACKED * size):
        raise ValueError(f"it has {size} bytes, and {claimed} of arrays in them")


def _read_torch(path):
    file = TorchFile(path)
    return file.arrays(file.found), None


def _read_safetensors(path):
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UserError(
            f"{path}: pip install 'xlformer[convert]' to read it"
        ) from error
    try:
        state = safetensors.numpy.load_file(path)
    # The library raises its own error, OSError or KeyError for a dtype numpy lacks.
    except Exception as error:
        raise UserError(
            f"{path} is not a readable safetensors file: {reason(error)}"
        ) from error
    return {name: widened(x) for name, x in state.items()}, None


def write_safetensors(
    path: pathlib.Path, arrays: Mapping[str, Any], metadata: dict | None = None
) -> None:
    """Writes a file; UserError without the package, OSError where it cannot be."""
    try:
        import safetensors.numpy
    except ImportError as error:
        line = "pip install 'xlformer[export]' to write safetensors"
        raise UserError(line) from error
    # In the order of C, which the package takes for granted.
    found = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    # It makes a file for its owner alone, which gets the mode that any other one has.
    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        safetensors.numpy.save_file(found, path, metadata)
    except Exception as error:  # It has errors of its own, also of a full disk.
        raise OSError(reason(error)) from error
    path.chmod(mode)


def widened(x: np.ndarray) -> np.ndarray:
    """Turns bfloat16, which is no float to numpy, into float32."""
    # Their kind is that of raw bytes; no bytes are in a file of arrays.
    return x.astype(np.float32) if x.dtype.kind == "V" else x


def read_sharded(index: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the files that an index of Hugging Face names, as one state.

    Args:
      index: JSON with a `weight_map`, from each name to the file beside it that has it.

    Raises:
      UserError: no such index, a file is missing or lies elsewhere, or a name does.
    """
    index = pathlib.Path(index)
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map from names to files")
    state: dict[str, np.ndarray] = {}
    for file in sorted({str(file) for file in names.values()}):
        # A path would lead out of the directory.
        if not re.fullmatch(r"\w[\w.-]*", file):
            raise UserError(f"{index} names {file!r:.80}, which is no file beside it")
        state |= read_state(index.with_name(file))[0]
    if missing := sorted(set(names) - set(state)):
        raise UserError(f"{index}: the files lack {some(missing)}")
    return {name: state[name] for name in names}
