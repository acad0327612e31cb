"""Compares files of numbers from the predecessors' own programs with what we compute.

    python tests/golden/check.py FILE|FOLDER ... [--float32]

One line a file. Everything comes from the file: its sizes, options and weights. A
folder that is no kind itself is searched for files and folders that are.

Ends with 0, or with 1 if an array misses its tolerance or was not compared (standard
error says which), or with 2 if a path is not there, unreadable, of no kind or refused
by its kind (one line each); of both, with 2. All other paths are compared all the same.

What a kind must have is in kinds/__init__.py.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import pathlib
import pkgutil
import sys
import zipfile
from collections.abc import Iterator

if __name__ == "__main__":  # As tests do: this checkout, in a fifth of the time.
    sys.path[:0] = [str(pathlib.Path(__file__).parents[n]) for n in (1, 2)]
    import quick

    os.environ.setdefault("XLA_FLAGS", quick.xla_flags(devices=1))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from golden import kinds
from golden.comparison import Result, judge

from xlformer.errors import BAD_INPUT, UserError

EXPECTED = "expected.npz"  # in every folder that is a kind


def check(path: str | os.PathLike, float32: bool = False) -> Result:
    """Compares one file, or one folder with an expected.npz.

    Raises:
      UserError: it cannot be read, or is of no kind; or the kind refuses it.
    """
    path = pathlib.Path(path)
    dtype = np.float32 if float32 else np.float64
    expected = path / EXPECTED if path.is_dir() else path
    arrays, config = _read(expected)
    cast = {
        name: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x
        for name, x in arrays.items()
    }
    with jax.enable_x64(not float32):
        if path.is_dir():
            compare = functools.partial(_kind_of_folder(path).compare_folder, path)
        else:
            compare = _kind_of(path, set(arrays), config).compare
        try:
            comparison = compare(arrays=cast, config=config, dtype=dtype)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return judge(str(path), arrays, comparison, dtype)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", metavar="FILE|FOLDER")
    parser.add_argument(
        "--float32", action="store_true", help="instead of in float64", default=False
    )
    args = parser.parse_args(argv)
    code = 0
    for path in args.paths:
        try:
            found = list(_search(pathlib.Path(path)))
        except UserError as error:
            print(error, file=sys.stderr)
            code = BAD_INPUT
            continue
        for each in found:
            code = max(code, _report(each, args.float32))
    return code


def _report(path: pathlib.Path, float32: bool) -> int:
    try:
        result = check(path, float32)
    except UserError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except Exception as error:  # A file that lacks what its kind needs, say.
        what = f"{type(error).__name__}: {_first_line(error)}"
        print(f"{path}: {what}", file=sys.stderr)
        return BAD_INPUT
    print(result, flush=True)
    for problem in result.problems:
        print(f"{path}: {problem}", file=sys.stderr)
    return 0 if result.ok else 1


def _search(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The path itself, or what is in a folder that is no kind."""
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path}: no such file")
        yield path
        return
    found = 0
    for folder, folders, files in os.walk(path):
        here = pathlib.Path(folder)
        if EXPECTED in files and any(_takes_folder(kind, here) for kind in _kinds()):
            folders.clear()
            files = [""]
        folders.sort()
        for name in sorted(files):
            if name == "" or name.endswith(".npz"):
                found += 1
                yield here / name
    if not found:
        raise UserError(f"{path}: no file of numbers in this folder")


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not an .npz file")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: unreadable ({_first_line(error)})") from error
    if "config" not in arrays:
        return arrays, {}
    try:
        config = json.loads(arrays.pop("config").tobytes())
    except ValueError as error:
        raise UserError(f"{path}: config is not JSON") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: config is not a JSON object")
    return arrays, config


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@functools.cache
def _kinds() -> tuple:
    names = sorted(m.name for m in pkgutil.iter_modules(kinds.__path__))
    return tuple(importlib.import_module(f"{kinds.__name__}.{n}") for n in names)


def _takes_folder(kind, folder: pathlib.Path) -> bool:
    return hasattr(kind, "matches_folder") and kind.matches_folder(folder)


def _kind_of_folder(folder: pathlib.Path):
    for kind in _kinds():
        if _takes_folder(kind, folder):
            return kind
    raise UserError(f"{folder}: a folder of no known kind")


def _kind_of(path: pathlib.Path, names: set[str], config: dict):
    for kind in _kinds():
        if hasattr(kind, "matches") and kind.matches(names, config):
            return kind
    known = ", ".join(kind.NAME for kind in _kinds())
    raise UserError(f"{path}: of no known kind ({known})")


if __name__ == "__main__":
    sys.exit(main())
