"""What a kind of golden file finds, and whether it is what the file says."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

# Of the greatest number of an array (values), of its norm (gradients).
VALUES = {np.float64: 1e-9, np.float32: 1e-4}
GRADIENTS = {np.float64: 1e-9, np.float32: 1e-3}
# Rounding moves a number by 6e-8 of itself, so an array that is stored in float32
# cannot be met more closely, with whatever precision it was computed.
STORED_IN_FLOAT32 = 1e-7
# Below this, numbers are the rounding of sums that cancel: their own size says nothing.
# Of values, which are about one; of gradients, by the greatest norm in the file.
LEAST_SCALE = {np.float64: 1e-6, np.float32: 1e-3}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was found for one file.

    All names are those of the file's arrays. What is found beyond them is ignored, so a
    kind may compute every gradient where the file keeps some.

    Attributes:
      values: name to what was found, in the file's layout. Whole numbers and truth
        values must be equal, for the rest see `relative_error`.
      gradients: likewise, relative to the norm of the array.
      given: names of inputs, which need no comparing: params/, inputs, masks.
      alternatives: groups of names of which one must agree, such as `x/grad/q` and
        `x/grad_max_constant/q`. A group counts as one array, with its least error.
      properties: name to an error, for arrays of which no number can be found again,
        only what holds for them, such as random orthogonal rows. Counts as a value.
      tolerances: name to its tolerance, where it is not that of this file.
    """

    values: Mapping[str, Any]
    gradients: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    given: Collection[str] = ()
    alternatives: Iterable[Collection[str]] = ()
    properties: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tolerances: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a file and what was found for it agree.

    Attributes:
      path: of the file or folder.
      values: the worst relative error of its values; 0 where it has none.
      gradients: of its gradients.
      compared: how many arrays were compared.
      total: how many must be.
      problems: what keeps it from being ok, a line each.
    """

    path: str
    values: float
    gradients: float
    compared: int
    total: int
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        return (
            f"{self.path} values={self.values:.1e} gradients={self.gradients:.1e} "
            f"arrays={self.compared}/{self.total} {'ok' if self.ok else 'FAIL'}"
        )


def relative_error(found, expected, *, norm: bool, least_scale: float) -> float:
    """The distance of two arrays, relative to the expected one.

    Args:
      norm: the norm of the difference by the norm of the array; otherwise the greatest
        difference by the greatest number.
      least_scale: what to divide by at the least.

    Returns:
      0 or more; of whole numbers and truth values the share that differs. Infinity
      where a number is none, or where the shapes differ.
    """
    found = np.asarray(found)
    if found.shape != expected.shape:
        return np.inf
    if not np.issubdtype(expected.dtype, np.floating):
        return float(np.mean(found != expected)) if expected.size else 0.0
    expected = expected.astype(np.float64)
    difference = found.astype(np.float64) - expected
    size = np.linalg.norm if norm else lambda x: np.max(np.abs(x), initial=0.0)
    error = float(size(difference.ravel()))
    scale = max(float(size(expected.ravel())), least_scale)
    return error / scale if np.isfinite(error) and np.isfinite(scale) else np.inf


def absolute(tolerance: float, arrays: Mapping, names: Iterable[str]) -> dict:
    """Tolerances that make arrays agree to `tolerance` itself, not relatively."""
    names = [name for name in names if name in arrays]
    greatest = [np.max(np.abs(arrays[name]), initial=0.0) for name in names]
    return {n: tolerance / max(x, 1.0) for n, x in zip(names, greatest, strict=True)}


def judge(path: str, arrays: Mapping, comparison: Comparison, dtype) -> Result:
    """Holds what was found against the arrays of the file."""
    errors = _errors(arrays, comparison, dtype)
    groups = [tuple(n for n in g if n in arrays) for g in comparison.alternatives]
    alone = set(arrays) - set(comparison.given) - {n for g in groups for n in g}
    worst = {False: 0.0, True: 0.0}
    compared, problems = 0, []
    groups = [group for group in groups if group] + [(name,) for name in sorted(alone)]
    for group in groups:
        candidates = [errors[name] for name in group if name in errors]
        if not candidates:
            problems.append(f"{' or '.join(group)} was not compared")
            continue
        compared += 1
        best = min(candidates, key=lambda e: e.by_tolerance)
        worst[best.is_gradient] = max(worst[best.is_gradient], best.error)
        if best.problem:
            problems.append(best.problem)
    if not groups:
        # A file that has lost its results agrees with whatever we compute.
        problems.append("nothing in this file can be compared: all of it is input")
    return Result(
        path, worst[False], worst[True], compared, len(groups), tuple(problems)
    )


@dataclasses.dataclass(frozen=True)
class _Error:
    name: str
    error: float
    tolerance: float
    is_gradient: bool
    shapes: tuple

    @property
    def by_tolerance(self) -> float:
        return self.error / self.tolerance if self.tolerance else self.error

    @property
    def problem(self) -> str:
        if self.error <= self.tolerance:
            return ""
        found, expected = self.shapes
        if found != expected:
            return f"{self.name} has the shape {expected}, found {found}"
        return f"{self.name} differs by {self.error:.1e}, not {self.tolerance:.0e}"


def _errors(arrays, comparison, dtype) -> dict[str, _Error]:
    norms = [np.linalg.norm(arrays[k]) for k in comparison.gradients if k in arrays]
    least = LEAST_SCALE[dtype] * max(filter(np.isfinite, norms), default=0.0)
    errors = {}
    for is_gradient, kind in (False, comparison.values), (True, comparison.gradients):
        for name in kind.keys() & arrays.keys():
            expected, found = arrays[name], np.asarray(kind[name])
            error = relative_error(
                found,
                expected,
                norm=is_gradient,
                least_scale=least if is_gradient else LEAST_SCALE[dtype],
            )
            tolerance = comparison.tolerances.get(
                name, _tolerance(expected.dtype, dtype, is_gradient)
            )
            shapes = found.shape, expected.shape
            errors[name] = _Error(name, error, tolerance, is_gradient, shapes)
    for name, error in comparison.properties.items():
        error = float(error) if np.isfinite(error) else np.inf
        tolerance = comparison.tolerances.get(name, VALUES[dtype])
        errors[name] = _Error(name, error, tolerance, False, ((), ()))
    return {name: error for name, error in errors.items() if name in arrays}


def _tolerance(stored, dtype, is_gradient: bool) -> float:
    if not np.issubdtype(stored, np.floating):
        return 0.0
    tolerance = (GRADIENTS if is_gradient else VALUES)[dtype]
    return max(tolerance, STORED_IN_FLOAT32) if stored.itemsize < 8 else tolerance
