"""The runs of `transfer`: those whose weights are read, and those that go on."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import os
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from xlformer import config as config_lib
from xlformer import runs
from xlformer.errors import Argument, UserError, about
from xlformer.instruments import members as members_lib
from xlformer.instruments import readings
from xlformer.instruments.instrument import Request
from xlformer.instruments.members import Member
from xlformer.training import start

# How weights of softmax are trained on; all but the first by FAVOR.
SOFTMAX, FRESH, LINFORMER = "softmax", "positive, from the start", "linformer"
CONTINUED = {
    SOFTMAX: {},
    "positive, redrawn": {"features": "positive"},
    "positive, one draw": {"features": "positive", "redraw_interval": 0},
    "SMREG, redrawn": {"features": "regularised"},
    "trigonometric, redrawn": {"features": "trigonometric"},
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is trained and read.

    Attributes:
      config: of the run whose weights are read, where none is given.
      source_steps, steps: of that run, and of each that goes on from it.
      redraw: steps that share a projection, of those that redraw.
      points: checkpoints of each run.
      tokens: that are read, of the validation split.
      maps: of readings.MAPS, at step 0.
      draws: of the projections of each.
      more: times the model's own number of rows, at step 0.
      kinds: of CONTINUED, and FRESH.
      masked: whether there is a second source, which says hidden symbols.
    """

    config: str
    source_steps: int
    steps: int
    redraw: int
    points: int
    tokens: int
    maps: tuple[str, ...]
    draws: int
    more: tuple[int, ...]
    kinds: tuple[str, ...]
    masked: bool


SMALL = Sizes(
    config="performer_small:mechanism=softmax",
    source_steps=1200,
    steps=300,
    redraw=70,
    points=6,
    tokens=16_384,
    maps=tuple(readings.MAPS),
    draws=5,
    more=(4, 16),
    kinds=(*CONTINUED, FRESH),
    masked=True,
)
TINY = dataclasses.replace(
    SMALL,
    config="performer_small:mechanism=softmax,debug",
    source_steps=2,
    steps=3,
    redraw=2,
    points=3,
    tokens=200,
    maps=("positive",),
    draws=2,
    more=(),
    kinds=("positive, redrawn",),
    masked=False,
)
SIZES = {"small": SMALL, "tiny": TINY}


def given(members: Sequence[Member]) -> Member:
    """The one run whose weights are read; UserError where it cannot be."""
    first, *others = members
    if others:
        raise UserError(
            Argument("workdir", others[0].run.workdir),
            ": one run is read, and there is ",
            Argument("workdir", first.run.workdir),
        )
    named = Argument("workdir", first.run.workdir)
    with about(named):
        softmax = readings.is_softmax(first.model)
    if not softmax:
        raise UserError(named, ": its attention is not softmax: nothing to approximate")
    if not runs.names_data(first.run.config):
        raise UserError(named, " names no data: it cannot be trained on")
    return first


def own_source(request: Request, sizes: Sizes, more: str = "") -> Member:
    """A run of ours, with a checkpoint for each point of its curve."""
    spec = f"{sizes.config},{more}" if more else sizes.config
    config = config_lib.load(spec)
    config.train.update(steps=sizes.source_steps, eval_every=0)
    length = config.train.segment_length
    if sizes.tokens <= length:
        line = f" must be more than a segment of {length}"
        raise UserError(Argument("tokens", sizes.tokens), line)
    if request.size == "tiny":
        # Python's own library takes seconds to prepare, and a second layer to compile.
        text = request.put("argparse.txt", inspect.getsource(argparse)[:20_000])
        config.data.update(corpus="text", path=os.fspath(text), unit="bytes")
        config.model.n_layer = 1
    _keep(config, sizes.source_steps, sizes.points)
    name = f"softmax-{sizes.source_steps}{'-masked' * bool(more)}"
    return members_lib.trained(name, config, request.runs)


def continued(
    request: Request, source: Member, sizes: Sizes, kind: str, steps: int
) -> Member:
    """A run that goes on from the source's weights, or from the start."""
    fields: dict[str, Any] = {}
    length = source.run.config.train.segment_length
    softmax_only = {k: readings.FAVOR[k] for k in ("attention", "attention_dropout")}
    if kind == LINFORMER:
        fields = {"mechanism": LINFORMER, **softmax_only, "context_length": length}
        fields["projection_length"] = max(1, length // 2)
    elif kind != SOFTMAX:
        options = CONTINUED.get(kind, {"features": "positive"})
        fields = {**readings.FAVOR, "redraw_interval": sizes.redraw, **options}
    overrides = [f"model.{name}={value}" for name, value in fields.items()]
    config = ConfigDict(source.run.config.to_dict())
    config.init_from = ""
    if source.data_paths:
        config.data.path = source.data_paths[0]
    config.train.steps = steps
    warmup = min(config.optimizer.warmup_steps, steps // 10)
    config.optimizer.warmup_steps = warmup
    _keep(config, steps, sizes.points)
    # One source or another: what goes on from it has a folder of its own.
    origin = f"{os.path.realpath(source.run.workdir)}:{source.run.step}"
    if source.run.mean_of:
        origin += f":{source.run.checkpoint}"
    folder = request.runs / f"from-{hashlib.sha256(origin.encode()).hexdigest()[:8]}"
    name = f"{kind.replace(', ', '-').replace(' ', '_')}-{steps}"
    if kind in (FRESH, LINFORMER):
        config_lib.set_fields(config, overrides)
    else:
        place = f"{os.fspath(source.run.workdir)}:{source.run.checkpoint}"
        config = start.with_model(config, place, folder / name, overrides)
    return members_lib.trained(name, config, folder)


def _keep(config: ConfigDict, steps: int, points: int) -> None:
    """Lets a run keep a checkpoint for each point of a curve."""
    every = max(1, steps // points)
    config.train.update(save_every=every, keep=steps // every + 2)
