"""Reading other programs' weight files, none of which can run code.

npz (allow_pickle=False), safetensors, and PyTorch state dicts through
torch.load(weights_only=True). A pickled module is refused.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np

from xlformer.errors import UserError, reason

STATE_DICT_RECIPE = (
    "where the model's code is installed run: model = torch.load('model.pt'); "
    "torch.save(model.state_dict(), 'state.pt')"
)


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
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
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
            state = dict(arrays)
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
    return {name: _widened(x) for name, x in state.items()}, None


def _widened(x: np.ndarray) -> np.ndarray:
    """Turns bfloat16, which is no float to numpy, into float32."""
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x


def _read_torch(path):
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: pip install torch to read it") from error
    try:
        # weights_only=True builds tensors and plain containers, and refuses every other
        # name that the pickle asks for.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} is not a state dict, and a pickled module could run any code; "
            f"{STATE_DICT_RECIPE} ({type(error).__name__})"
        ) from error
    plain = isinstance(state, dict) and all(torch.is_tensor(x) for x in state.values())
    if not plain or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} holds no state dict; {STATE_DICT_RECIPE}")
    try:
        return {name: _numpy(x) for name, x in state.items()}, None
    # Sparse and quantised tensors, and those without data, raise errors of their own.
    except Exception as error:
        raise UserError(
            f"{path} holds tensors that are no plain arrays: {reason(error)}"
        ) from error


def _numpy(tensor) -> np.ndarray:
    # numpy has no bfloat16 and none of torch's 8-bit floats; float16 is widened too.
    half = tensor.is_floating_point() and tensor.element_size() < 4
    return (tensor.float() if half else tensor).numpy()
