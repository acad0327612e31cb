"""Numbers and trees as people read them: short forms, and the tables of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence


def short(number: float) -> str:
    """12345 as '12.3k'."""
    for unit in ("", "k", "M", "G"):
        # From there on one decimal would be rounded up to 1000.0. `not >=` lets NaN
        # through.
        if not abs(number) >= 999.95:
            return f"{number:.1f}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:.1f}T"


def duration(seconds: float) -> str:
    """3723 as '1:02:03', or with days '2d 1:02:03'; '?' if it is not known."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    # Rounded first, or 59.7 s would be shown as 0:00:60.
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def binary_size(n: float) -> str:
    """Bytes as '1.50 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n:.2f} TiB"


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Rows of cells as lines with columns, two spaces apart.

    The first `left` columns begin at the same place, the others, which are numbers, end
    there.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            f"{cell:<{width}}" if number < left else f"{cell:>{width}}"
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


# Tables of a model -------------------------------------------------------------------

EMBEDDING_NAMES = ("embedding", "softmax")


def is_embedding(path: str) -> bool:
    """True for the leaves that grow with the vocabulary, by the names on their path."""
    return any(name in part for part in path.split("/") for name in EMBEDDING_NAMES)


def parameter_table(params) -> str:
    """Path, shape, dtype and count of each leaf, of arrays or of eval_shape's tree."""
    rows = [
        (
            path,
            "x".join(map(str, x.shape)) or "scalar",
            str(x.dtype),
            math.prod(x.shape),
        )
        for path, x in _flatten(params)
    ]
    total = sum(count for *_, count in rows)
    embedding = sum(row[-1] for row in rows if is_embedding(row[0]))
    cells = [("parameter", "shape", "dtype", "count")]
    cells += [(path, shape, dtype, f"{n:,}") for path, shape, dtype, n in rows]
    cells.append(("total", "", "", f"{total:,}"))
    if embedding:  # A model of one's own may call it anything.
        cells += [
            ("  embedding and softmax", "", "", f"{embedding:,}"),
            ("  non-embedding", "", "", f"{total - embedding:,}"),
        ]
    return "\n".join(aligned(cells, left=3))


def memory_estimate(params, opt_state, state) -> str:
    """Bytes of what stays between steps, over all devices; from eval_shape's trees.

    Activations are not in it; the gradients, as large as the parameters, are named.
    """
    sizes = {
        "parameters": tree_bytes(params),
        "gradients": tree_bytes(params),
        "optimizer": tree_bytes(opt_state),
        "carried state": tree_bytes(state),
    }
    parts = ", ".join(f"{name} {binary_size(size)}" for name, size in sizes.items())
    return f"memory: {parts}; {binary_size(sum(sizes.values()))} without activations"


def tree_bytes(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for _, x in _flatten(tree))


def _flatten(tree):
    # Here, because what else is in this file serves processes without JAX.
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), x)
        for path, x in leaves
    ]
