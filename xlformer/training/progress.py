"""What a run says: first what is trained on what, then losses and tokens per second."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from xlformer import tables
from xlformer.data.prepared import Prepared
from xlformer.models import Model
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
        """Forgets losses and time, and lets the clock run from here."""
        self._losses, self._steps = [], 0
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def pause(self):
        """Leaves the time inside of it out of tokens/s and of what remains."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def add(self, losses: np.ndarray, finite: np.ndarray) -> None:
        """Takes in the losses of one call; those of dropped steps enter no mean."""
        # Dropped steps count as steps all the same: their tokens took their time.
        self._losses += losses[finite].tolist()
        self._steps += len(losses)

    def log(self, step: int, values: dict) -> None:
        """Writes a record and a line, and starts anew."""
        loss = float(np.mean(self._losses)) if self._losses else float("nan")
        # Pauses do not count, so the clock may not have moved at all.
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


def introduction(
    train, model: Model, train_state, mesh, prepared: Prepared, *, segments: int
) -> Iterator[str]:
    """Lines about machine, model and data.

    train: the section of a config; segments: of an epoch.
    """
    device, devices = jax.devices()[0], jax.device_count()
    shown = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    yield (
        f"jax {jax.__version__} on {devices} x {device.device_kind} "
        f"({device.platform}), mesh {shown}"
    )
    if mesh.size < devices:
        yield (
            f"{devices - mesh.size} of {devices} devices stay idle: config.mesh and "
            f"config.train.batch_size={train.batch_size} have no use for them"
        )
    params, carried = train_state.params, train_state.carried
    yield tables.parameter_table(params)
    yield tables.memory_estimate(params, train_state.opt_state, carried)
    dtype = model.dtype(params)
    if dtype is not None:
        yield f"computing in {dtype.name}; parameters and optimizer in float32"
    yield (
        f"data: {prepared.card['corpus']}, {len(prepared.tokens['train']):,} training "
        f"tokens, {prepared.vocabulary.size} symbols, an epoch is {segments:,} segments"
    )
