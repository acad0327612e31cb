"""A model as compiled functions: StableHLO that any machine with jax can run.

manifest.json    what is here: the programs with what they take and give, the memory
score.jax, ...   the functions of programs.py, as jax.export serializes them
params.npz       the parameters, which every program takes as its first argument
vocabulary.json  what the ids mean
run_exported.py  scores and continues ids with all this, and without xlformer

Parameters are an input, not constants: in a program they would be copied once more
into each of the four, and a program of more than 2 GiB cannot be serialized. They are
an npz, which numpy reads by itself.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np
from jax import export

from xlformer import __version__, runs
from xlformer.convert import portable
from xlformer.errors import Argument, UserError, reason
from xlformer.exporting.programs import (
    BATCH,
    Generating,
    Memory,
    Program,
    Scoring,
    fit,
    symbolic,
)
from xlformer.models import checks
from xlformer.runs import leaves

FORMAT = "xlformer stablehlo 1"
PLATFORMS = ("cpu", "cuda", "tpu")
MANIFEST, PARAMS, SCRIPT = "manifest.json", "params.npz", "run_exported.py"
# What tracing raises where it has to know a number that is left open.
OPEN = (TypeError, ValueError, NotImplementedError, jax.errors.JAXTypeError)


def write(
    run: runs.Run,
    folder: pathlib.Path,
    *,
    segment_length: int | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """Writes all of it into a directory that is there; returns the manifest.

    Args:
      run: of runs.load, a model of one's own too.
      segment_length: targets in a call of `score`; by default as config.eval says.
      batch_size: rows; None is any number, and one where JAX cannot leave it open.
      dtype: to compute in; None is what the config says, float32 where that is 'auto'.
      say: told in one line what is not there, and why.
    """
    _check_flatbuffers()
    model = fit(run.model, dtype)
    T = run.config.eval.segment_length if segment_length is None else segment_length
    checks.segment(model, Argument("segment_length", T), T)
    try:
        made = _Made(model, T, symbolic() if batch_size is None else batch_size, run)
    except OPEN as error:
        if batch_size is not None:
            raise
        say(f"for one row alone, JAX cannot leave their number open: {reason(error)}")
        made = _Made(model, T, 1, run)
    if made.refusal:
        say(f"scoring only: {made.refusal}")
    for name, exported in made.exported.items():
        (folder / f"{name}.jax").write_bytes(exported.serialize())
    manifest = _about(run, model, made) | {"segment_length": T}
    text = json.dumps(manifest, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    params = leaves.flatten(run.params)
    np.savez(folder / PARAMS, **{name: np.asarray(x) for name, x in params.items()})
    portable.write_vocabulary(run, folder)
    shutil.copyfile(pathlib.Path(__file__).with_name(SCRIPT), folder / SCRIPT)
    return manifest


class _Made:
    """What is exported of a model, for a number of rows or for any.

    Attributes:
      exported: jax.export.Exported by name.
      memories: what `score` and `read` begin with: (model, Memory) by name.
      refusal: why there is only `score`, if so.
    """

    def __init__(self, model, T: int, rows, run: runs.Run):
        self.rows, self.refusal, self.part = rows, "", None
        scoring = Scoring(model, T, rows, run.step)
        self.programs, self.memories = (
            [scoring.program],
            {"score": (model, scoring.memory)},
        )
        try:
            generating = Generating(model, rows, run.step)
        except UserError as error:
            self.refusal = str(error)
        else:
            self.programs += generating.programs
            self.memories["read"] = generating.model, generating.memory
            self.part = generating.part
        self.exported = {p.name: _exported(p) for p in self.programs}


def _exported(program: Program) -> export.Exported:
    arguments = [argument.shape for argument in program.arguments]
    function = jax.jit(program.function)
    return export.export(function, platforms=PLATFORMS)(*arguments)


def _check_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        line = "jax.export serializes with flatbuffers: pip install 'xlformer[export]'"
        raise UserError(line) from error


# The manifest -------------------------------------------------------------------------


def _about(run: runs.Run, model, made: _Made) -> dict:
    anyone = next(iter(made.exported.values()))
    dtype = model.dtype(run.params)
    return {
        "format": FORMAT,
        "xlformer": __version__,
        "jax": jax.__version__,
        "calling_convention_version": anyone.calling_convention_version,
        "platforms": list(PLATFORMS),
        "run": run.config.name,
        "model": type(model).__name__,
        "step": run.step,
        "weights": "ema" if run.averaged else "raw",
        "mean_of": list(run.mean_of),
        "dtype": None if dtype is None else dtype.name,
        "objective": run.config.train.objective,
        "batch": _size(made.rows),
        "rows": made.rows if isinstance(made.rows, int) else 1,
        "extended_length": model.extended_length,
        "resets": made.programs[0].arguments[-1].shape.shape[1],
        "prompt_length": made.part,
        "scoring_only": made.refusal or None,
        "vocabulary": {
            "file": runs.VOCABULARY,
            "kind": run.vocabulary.kind,
            "unit": run.vocabulary.unit,
            "size": run.vocabulary.size,
            "ids": model.vocab_size,
        },
        "parameters": {"file": PARAMS},
        "programs": {
            p.name: _of_program(p, made.exported[p.name]) for p in made.programs
        },
        "memory": {name: _initial(*x, made.rows) for name, x in made.memories.items()},
    }


def _of_program(program: Program, exported: export.Exported) -> dict:
    results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    results = results if len(program.results) > 1 else (results,)
    named = zip(program.results, results, strict=True)
    return {
        "file": f"{program.name}.jax",
        "arguments": [
            {"name": x.name, "meaning": x.meaning} | _shapes(x.shape)
            for x in program.arguments
        ],
        "results": [
            {"name": name, "meaning": meaning} | _shapes(x)
            for (name, meaning), x in named
        ],
    }


def _shapes(x) -> dict:
    if isinstance(x, dict):
        return {"arrays": {name: _shapes(one) for name, one in x.items()}}
    return {"shape": [_size(n) for n in x.shape], "dtype": x.dtype.name}


def _size(n) -> int | str:
    return n if isinstance(n, int) else BATCH


def _initial(model, memory: Memory, rows) -> dict:
    """The state before the first token: `initial` is what numpy.full makes it of.

    That is a shape with the fixed number of rows or one, a number or the array of one
    row, and a dtype.
    """
    rows = rows if isinstance(rows, int) else 1
    found = {}
    one = memory.arrays(jax.device_get(jax.jit(lambda: model.init_state(1))()))
    for name, leaf in memory.shapes.items():
        x = one[name]
        value = x.astype(np.float64 if x.dtype.kind not in "biu" else x.dtype)
        # An array without elements, the memory of no slots, has no first one.
        first = value.flat[0] if value.size else np.zeros(())
        value = first if (value == first).all() else value
        found[name] = {
            **_shapes(leaf),
            "axes": list(memory.axes[name]),
            "initial": [
                [n if isinstance(n, int) else rows for n in leaf.shape],
                _plain(np.asarray(value).tolist()),
                leaf.dtype.name,
            ],
        }
    return found


def _plain(x):
    """JSON has no infinities; numpy reads them from texts."""
    if isinstance(x, list):
        return [_plain(one) for one in x]
    return x if np.isfinite(x) else str(x)
