"""Between two lines of the log: the mean loss, and tokens per second of training."""

from __future__ import annotations

import contextlib
import time

import numpy as np

from xlformer import tables
from xlformer.runs import log


class Progress:
    """Collects losses and time, and turns them into a record and a line.

    train: the section of a config. score: (nats) -> ('bpc' or 'ppl', value).
    """

    def __init__(self, train, writer: log.Writer, score):
        self._total, self._writer, self._score = train.steps, writer, score
        self._per_step = train.batch_size * train.segment_length
        self.restart()

    def restart(self) -> None:
        """Forgets everything; the clock runs from here."""
        self._losses, self._steps = [], 0
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def pause(self):
        """Time inside of it is not training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def add(self, losses: np.ndarray, finite: np.ndarray) -> None:
        """The losses of one call; those of dropped steps enter no mean."""
        self._losses += losses[finite].tolist()
        self._steps += len(losses)

    def log(self, step: int, values: dict) -> None:
        """Writes a record and a line, and starts anew."""
        loss = float(np.mean(self._losses)) if self._losses else float("nan")
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = self._steps * self._per_step / seconds
        unit, score = self._score(loss)
        values = values | {"train/loss_nats": loss, f"train/{unit}": score}
        self._writer.write(step, values | {"perf/tokens_per_s": rate})
        line = format_progress(
            step=step,
            total=self._total,
            loss_nats=loss,
            score=score,
            unit=unit,
            tokens_per_s=rate,
            eta_s=(self._total - step) * self._per_step / rate,
        )
        self._writer.console(line)
        self.restart()


def format_progress(
    *,
    step: int,
    total: int,
    loss_nats: float,
    score: float,
    unit: str,
    tokens_per_s: float,
    eta_s: float,
) -> str:
    """'step 1,200/10,000  loss 1.234  bpc 1.780  12.3k tokens/s  eta 1:02:03'."""
    width = len(f"{total:,}")
    return (
        f"step {step:>{width},}/{total:,}  loss {loss_nats:.4f}  {unit} {score:.4f}  "
        f"{tables.short(tokens_per_s)} tokens/s  eta {tables.duration(eta_s)}"
    )
