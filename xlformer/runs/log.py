"""What a run says about itself: metrics.jsonl, TensorBoard, the console, tables.

Names are paths with units: train/loss_nats, train/bpc, eval/bpc, perf/tokens_per_s,
norm/grad. `metrics.jsonl` in the work directory has one object per line:

    {"step": 100, "kind": "train", "time": 1700000000.0, "train/bpc": 2.31, ...}

A number that is not finite becomes "nan", "inf" or "-inf", in quotes: JSON has no such
numbers. After a resume at step s the lines of later steps that the killed run had
written stay in the file; `read` returns the last record of each (step, kind).
TensorBoard is told by `rewind` to forget them: its curves never go back.

In gs:// nothing can be appended: there the lines lie in metrics-000001-<id>.jsonl and
so on. A part is written whole again as it grows, at least every FLUSH_S seconds while
lines come, and when the run calls `flush` before it saves: whatever a checkpoint knows,
the log knows too, and a kill costs at most the lines that the resumed run writes again.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath

from xlformer import storage, strangers

FILE = "metrics.jsonl"
PART = re.compile(r"metrics-([0-9]{6,18})-\w+\.jsonl")  # in an object store
# Each upload writes its part again: more of them would cost requests and traffic, fewer
# would keep lines from whoever watches the run. Parts are closed at some size, so that
# an upload does not grow with the run.
FLUSH_S = 30.0  # between two uploads of a part, unless the run asks for one
PART_SIZE = 1 << 20  # characters; a longer part is not written again


class Writer:
    """Appends metrics of one run.

    With enabled=False, as on all hosts but the first, it does nothing at all.
    """

    def __init__(self, workdir, *, enabled: bool = True):
        self._workdir = storage.path(workdir)
        self._enabled = enabled
        self._file = self._events = self._purge_step = None
        if enabled:
            self._workdir.mkdir(parents=True, exist_ok=True)
            remote = storage.is_remote(self._workdir)
            self._file = (_Parts if remote else _open_for_append)(self._workdir)

    def rewind(self, step: int) -> None:
        """Says that the run goes on from `step`, whatever was written of later ones."""
        # TensorBoard learns of it from the first event of a file, so the next `write`
        # opens a new one.
        events, self._events = self._events, None
        if events:
            events.close()
        self._purge_step = step + 1 if step else 0

    def write(self, step: int, values: Mapping[str, object], *, kind="train") -> None:
        """Writes one line.

        values: scalars or strings; arrays of one element count as scalars, so read them
        from the device before.
        """
        if not self._enabled:
            return
        record = {"step": int(step), "kind": kind, "time": time.time()}
        record |= {name: _jsonable(value) for name, value in values.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()  # a killed run keeps what it has logged
        if self._events is None:
            self._events = _tensorboard(self._workdir, self._purge_step)
        if self._events:
            for name, value in values.items():
                if not isinstance(value, str):
                    self._events.add_scalar(name, float(value), int(step))

    def flush(self) -> None:
        """Makes every line visible to others now; locally they always are."""
        if isinstance(self._file, _Parts):
            self._file.upload()

    def console(self, line: str) -> None:
        if self._enabled:
            with contextlib.suppress(BrokenPipeError):  # a run outlives its terminal
                print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        file, events = self._file, self._events
        self._enabled, self._file, self._events = False, None, None
        try:
            if file:
                file.close()
        finally:  # also where the disk is full
            if events:
                events.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def _open_for_append(workdir: epath.Path):
    path = workdir / FILE
    # In bytes: a file that is cut off may end in the middle of a character.
    file = open(path, "ab+")
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":  # the killed run stopped in mid-line
            file.write(b"\n")
    return io.TextIOWrapper(file, encoding="utf-8")


class _Parts:
    """A file of lines in an object store."""

    def __init__(self, workdir: epath.Path):
        self._workdir = workdir
        # Should two runs write at once after all, neither overwrites the other's parts.
        self._id = uuid.uuid4().hex[:8]
        # Numbers go on from those of earlier attempts, so that names sort by time.
        found = [PART.fullmatch(path.name) for path in parts(workdir)]
        self._number = max((int(name[1]) for name in found if name), default=0)
        self._next()

    def _next(self) -> None:
        self._number += 1
        self._path = self._workdir / f"metrics-{self._number:06d}-{self._id}.jsonl"
        self._lines, self._new, self._uploaded = [], False, time.monotonic()

    def write(self, line: str) -> None:
        self._lines.append(line)
        self._new = True

    def flush(self) -> None:
        """Uploads, if the last upload is FLUSH_S ago; it is called after each line."""
        if time.monotonic() - self._uploaded >= FLUSH_S:
            self.upload()

    def upload(self) -> None:
        if not self._new:
            return
        text = "".join(self._lines)
        storage.write(self._path, text)
        self._new, self._uploaded = False, time.monotonic()
        if len(text) > PART_SIZE:
            self._next()

    def close(self) -> None:
        self.upload()


def parts(workdir: epath.Path) -> list[epath.Path]:
    """The files of lines, oldest first."""
    found = sorted(workdir.glob("metrics*.jsonl"))
    # Object stores have neither folders nor pipes. Those are files to etils.
    return [
        path
        for path in found
        if storage.is_remote(path)
        or (path.is_file() and not strangers.is_endless(path))
    ]


def _tensorboard(workdir: epath.Path, purge_step: int | None):
    """A writer, or False; purge_step: from there on, older files are void."""
    if storage.is_remote(workdir):
        return False  # tensorboardX appends, which object stores cannot
    try:
        import tensorboardX
    except ImportError:
        return False
    # Files are read in the order of their names, which tensorboardX tells apart by the
    # second: two in one second would be one.
    return tensorboardX.SummaryWriter(
        str(workdir / "tensorboard"),
        purge_step=purge_step,
        filename_suffix=f".{time.time_ns()}",
    )


def read(workdir, *, kind: str | None = None) -> list[dict]:
    """Returns the last record of every (step, kind) in order of steps.

    The last, because a step that was repeated after a kill is written again. Non-finite
    numbers come back as floats. A torn last line is skipped, and so is whatever no run
    has written.
    """
    records = {}
    for record in lines(storage.path(workdir)):
        known = {k: _NONFINITE.get(v, v) for k, v in record.items()}
        records[record["step"], record["kind"]] = known
    found = [records[key] for key in sorted(records)]
    return [r for r in found if kind is None or r["kind"] == kind]


def lines(workdir: epath.Path) -> Iterator[dict]:
    """Yields all records in the order of writing, those that were repeated too."""
    for path in parts(workdir):
        for line in path.read_bytes().decode("utf-8", "replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            # A stranger's may hold anything; ours has numbers and texts.
            if isinstance(record, dict) and _is_ours(record):
                yield record


def _is_ours(record: dict) -> bool:
    plain = all(isinstance(x, int | float | str) for x in record.values())
    step, kind = record.get("step"), record.get("kind")
    step_is = type(step) is int and 0 <= step < 1 << 63
    return plain and step_is and isinstance(kind, str)


# As strings: json.dumps would write NaN and Infinity, which are not JSON.
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _jsonable(value):
    if isinstance(value, str):
        return value
    value = np.asarray(value).item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
