"""Weights in the names of the predecessors' programs, of the files in tests/golden."""

import functools
import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"


def read(name):
    """(the state dict, the hparams) of a file."""
    state, hparams = _read(name)
    return dict(state), dict(hparams)


@functools.cache
def _read(name):
    with np.load(FOLDER / name, allow_pickle=False) as file:
        names = [name for name in file.files if name.startswith("params/")]
        state = {name.removeprefix("params/"): file[name] for name in names}
        return state, json.loads(file["config"].tobytes())


def changed(state, **arrays):
    """A state with other arrays; None leaves one out. `__` is a dot."""
    found = state | {name.replace("__", "."): x for name, x in arrays.items()}
    return {name: x for name, x in found.items() if x is not None}
