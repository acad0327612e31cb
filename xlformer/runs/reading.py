"""What lies in a work directory, for the commands that only read it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from xlformer import config as config_lib
from xlformer import models, sharding, storage, strangers
from xlformer.data import preparing, vocabularies
from xlformer.data.vocabulary import Vocabulary
from xlformer.errors import Argument, UserError
from xlformer.fields import UNSAID
from xlformer.models.parameters import abstract_params
from xlformer.runs import averages, resume
from xlformer.runs.checkpoints import Checkpoints

CONFIG, VOCABULARY, CHECKPOINTS = "config.json", "vocabulary.json", "checkpoints"
EVALUATION = "evaluation-"  # how the names of evaluate's newest results begin
EVALUATIONS = "evaluations"  # all of them; see cards.py
AVERAGE = "average:"  # how a checkpoint is named that is the mean of the last ones
CHECKPOINT_HELP = "best, latest, a step, or average:N, the mean of the last N"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model: everything that scoring and sampling need."""

    workdir: epath.Path
    config: ConfigDict
    model: models.Model
    params: Any
    vocabulary: Vocabulary
    step: int
    averaged: bool  # whether params is the average of the run's
    # Steps of the checkpoints whose mean params is, where average:N was asked for.
    mean_of: tuple[int, ...] = ()

    @property
    def checkpoint(self) -> str:
        """What `load` is told to read the same again, while no more is trained."""
        return f"{AVERAGE}{len(self.mean_of)}" if self.mean_of else str(self.step)


def read_config(workdir) -> ConfigDict:
    """The resolved config of a work directory; UserError if it holds no run."""
    path = storage.path(workdir) / CONFIG
    try:
        text = strangers.read(path).decode()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            Argument("workdir", workdir),
            f" holds no run: there is no {CONFIG} in it",
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a resolved config: {error}") from error
    return config_lib.from_json(text, str(path))


def refuse_links(workdir, written: Iterable[str]) -> None:
    """Raises UserError if one of these names, or what lies in it, is a symbolic link.

    A link in a stranger's directory would have us write wherever it points to.
    """
    for path in strangers.below(workdir, written):
        if os.path.islink(path):
            raise UserError(
                Argument("workdir", workdir),
                f": {os.path.relpath(path, workdir)} is a symbolic link to "
                f"{os.readlink(path)}; what is written must lie in the work directory "
                "itself",
            )


def load(
    workdir,
    *,
    checkpoint: str | int = "best",
    params: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    model: models.Model | None = None,
) -> Run:
    """Loads a run for reading; works on any devices and never touches its state.

    Where jax.distributed is initialized all hosts must call it, with equal arguments.

    Args:
      workdir: of `xlformer.train` or `xlformer.convert`.
      checkpoint: best, latest, a step, or average:N, which is the mean of the
        parameters of the last N; best is the latest where none was validated.
      params: raw or ema; None is ema where the run keeps one, which is also what its
        validation scored.
      mesh: where the parameters shall lie; by default on the first device. It need not
        be like the one that saved them.
      model: your own, as it was given to `train`; else it is built from the config.

    Raises:
      UserError: no run, no such checkpoint, a damaged one, or one of another model.
    """
    workdir = storage.path(workdir)
    latest = read_config(workdir)
    # Scoring writes into these, so that they are looked at before it begins.
    results = [p.name for p in workdir.iterdir() if p.name.startswith(EVALUATION)]
    refuse_links(workdir, [*results, EVALUATIONS])
    checkpoints = Checkpoints(workdir / CHECKPOINTS, read_only=True)
    steps = _steps(checkpoints, checkpoint, latest)
    config = _sealed(workdir, checkpoints, steps[0], latest)
    vocabulary = _vocabulary(workdir, config)
    model = _model(workdir, config, vocabulary, model)
    name = _params(config, params)
    # Shapes alone: nothing is initialised to be written over. Of the checkpoint only
    # the parameters are read, about a third of a training state with Adam.
    abstract = abstract_params(model)
    mesh = mesh or sharding.make_mesh({"data": 1})
    placed = sharding.parameters(mesh, abstract, model.param_axes(abstract))
    abstract = sharding.with_shardings(abstract, placed)

    def read(step):
        return checkpoints.restore_params(step, {name: abstract})[name]

    is_mean = str(checkpoint).startswith(AVERAGE)
    if is_mean:
        _check_one_run(checkpoints, steps, config, checkpoint)
    return Run(
        workdir,
        config,
        model,
        averages.mean(read, steps) if is_mean else read(steps[0]),
        vocabulary,
        steps[0],
        name == "ema",
        tuple(reversed(steps)) if is_mean else (),
    )


def _check_one_run(checkpoints, steps, config: ConfigDict, which: str) -> None:
    """Raises UserError where the mean would be of parameters that differ in meaning."""
    for step in steps[1:]:
        where = f"{checkpoints.directory}: config of step {step}"
        other = config_lib.from_dict(checkpoints.config(step), where=where)
        for line in resume.differences(other, config)[:1]:
            raise UserError(
                Argument("checkpoint", which),
                f": the configs in {checkpoints.directory} differ: step {steps[0]} has "
                f"{line}, at step {step}",
            )


def _model(workdir, config, vocabulary: Vocabulary, own: models.Model | None):
    """What the run was trained with; `own` where that is no model of this package."""
    name, size = config.own_model, config_lib.vocab_size(config, vocabulary.size)
    if own is None:
        if name not in ("", UNSAID):
            raise UserError(
                Argument("workdir", workdir),
                f" was trained with a model of one's own, {name}: read it in Python, "
                "with model=...",
            )
        return models.build(config.model, vocab_size=size)
    if name not in (UNSAID, resume.own_name(own)):
        built = name or f"config.model.name={config.model.name!r}"
        raise UserError(
            Argument("workdir", workdir),
            f" was trained with {built}, model is of {type(own).__qualname__}",
        )
    if own.vocab_size < size:
        raise UserError(f"model knows {own.vocab_size} ids, the run needs {size}")
    return own


def _params(config, which: str | None) -> str:
    """Under which name the parameters lie in a checkpoint."""
    if which is None:
        which = "ema" if config_lib.keeps_average(config) else "raw"
    if which not in ("raw", "ema"):
        raise UserError(Argument("params", which), " is neither raw nor ema")
    if which == "ema" and not config_lib.keeps_average(config):
        line = (
            " but the run has config.train.ema_decay=0.0 and "
            "config.train.tail_average=0.0"
        )
        raise UserError(Argument("params", "ema"), line)
    return {"raw": "params", "ema": "ema"}[which]


def read_sealed(workdir, checkpoint: str = "best") -> ConfigDict:
    """The config of a checkpoint of a run, without its weights; see `load`."""
    workdir = storage.path(workdir)
    latest = read_config(workdir)
    checkpoints = Checkpoints(workdir / CHECKPOINTS, read_only=True)
    step = _steps(checkpoints, checkpoint, latest)[0]
    return _sealed(workdir, checkpoints, step, latest)


def read_vocabulary(workdir, checkpoint: str = "best") -> Vocabulary:
    """The vocabulary of a run, without its weights; see `load`."""
    config = read_sealed(workdir, checkpoint)
    return _vocabulary(storage.path(workdir), config)


def _sealed(workdir, checkpoints, step, latest: ConfigDict) -> ConfigDict:
    """What the weights of a step were trained with, whatever config.json says now.

    Where things lie comes from config.json, which is of the latest start.
    """
    where = f"{workdir / CHECKPOINTS}: config of step {step}"
    config = config_lib.from_dict(checkpoints.config(step), where=where)
    if other := resume.differences(config, latest):
        _log.warning(
            "%s says %s: the checkpoint's own is used", workdir / CONFIG, other[0]
        )
    return resume.with_free_fields(config, latest)


def _vocabulary(workdir, config) -> Vocabulary:
    """The run's own; converted weights without one take that of their data."""
    if (workdir / VOCABULARY).exists() or not config.model.vocab_size:
        return vocabularies.load(workdir / VOCABULARY)
    if not names_data(config):
        raise UserError(
            Argument("workdir", workdir),
            f" has no {VOCABULARY}, and its config names no data: convert again with "
            "--vocab=FILE, or with --config.data.corpus=NAME",
        )
    return preparing.prepare(config.data, stored=True).vocabulary


def names_data(config: ConfigDict) -> bool:
    """False where converted weights came without data."""
    return config.data.corpus != "text" or bool(config.data.path)


def _steps(checkpoints, which: str | int, config: ConfigDict) -> list:
    """The step that `which` names; of average:N the last N, the newest first."""
    which = str(which)
    if which.startswith(AVERAGE):
        return _last(checkpoints, which, config.train)
    if which in ("best", "latest"):
        best = checkpoints.best() if which == "best" else None
        return [agreed(checkpoints.latest() if best is None else best)]
    if not is_step(which):
        line = f" is neither best, latest, {AVERAGE}N nor a step"
        raise UserError(Argument("checkpoint", which), line)
    return [int(which)]


def _last(checkpoints, which: str, train) -> list[int]:
    """The steps of average:N; train: the section of the config of the latest start."""
    named, text = Argument("checkpoint", which), which.removeprefix(AVERAGE)
    if not is_step(text) or not int(text):
        raise UserError(named, f": N of {AVERAGE}N is a whole number, at least 1")
    wanted, there = int(text), checkpoints.steps()
    # The best one is kept beside them: between it and them some may be gone.
    if wanted > train.keep:
        raise UserError(
            named,
            f": the run keeps its last {train.keep} checkpoints "
            f"(config.train.keep={train.keep}), train with config.train.keep={wanted} "
            "or more",
        )
    # All hosts go by what the first one sees.
    count = agreed(len(there))
    if wanted > count:
        shown = f": steps {', '.join(map(str, there))}" if there else ""
        raise UserError(
            named,
            f": there are {count} checkpoints in {checkpoints.directory}{shown} "
            f"(config.train.save_every={train.save_every})",
        )
    last = [None] * (wanted - len(there)) + there[-wanted:]
    return [agreed(step) for step in reversed(last)]


def is_checkpoint(which: str) -> bool:
    """Whether a text names a checkpoint as `load` takes it."""
    if which in ("best", "latest"):
        return True
    return is_step(which.removeprefix(AVERAGE))


def is_step(which: str) -> bool:
    """Whether a text is the number of a step."""
    # int() would take digits of any script, and fail on thousands of them; 18 digits
    # fit into 64 bits.
    return which.isascii() and which.isdigit() and len(which) < 19


def agreed(step: int | None) -> int | None:
    """What the first of several hosts says.

    Of a run that is being trained another host may see one checkpoint more or less.
    """
    if jax.process_count() == 1:
        return step
    # None cannot be broadcast; -1, which is no step, stands for it.
    found = multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step))
    return None if int(found) == -1 else int(found)
