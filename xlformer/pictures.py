"""Pictures as files, made with matplotlib, which belongs to the extra `plot`."""

from __future__ import annotations

import importlib.util
import io

from xlformer import storage
from xlformer.errors import Argument, UserError

NEEDED = "matplotlib: pip install 'xlformer[plot]'"


def can_be_made() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check(argument: Argument) -> None:
    """Raises UserError where no picture can be made, for the flag that wants one."""
    if not can_be_made():
        raise UserError(argument, f" needs {NEEDED}")


def figure(width: float = 8.0, height: float = 3.5):
    """An empty Figure, in inches."""
    # Here and not above, because only pictures need it.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path) -> None:
    """Writes a Figure; the end of the path says as what: .svg or .png."""
    import matplotlib

    found, kind = io.BytesIO(), str(path).rpartition(".")[2]
    # Letters stay text and nothing depends on the day, so that the file is small and a
    # repetition gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "xlformer"}):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(found, format=kind, metadata=metadata)
    storage.put(path, found.getvalue())
