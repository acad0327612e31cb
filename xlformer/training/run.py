"""A run from beginning to end: config -> hosts -> mesh -> data -> model -> loop.

A second call with the same directory resumes, and does bit by bit what an uninterrupted
run would have done; on another number of devices, but for the order of sums. Each host
of a job makes the same call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import signal
import sys

import jax
from etils import epath
from ml_collections import ConfigDict

from xlformer import config as config_lib
from xlformer import hosts, models, runs, sharding, storage
from xlformer.data import preparing, translation, vocabularies
from xlformer.data.prepared import Prepared
from xlformer.errors import Argument, UserError
from xlformer.fields import UNSAID
from xlformer.hosts import faults
from xlformer.hosts.watchdog import Watchdog
from xlformer.runs import goodput, log, resume, writing
from xlformer.runs.checkpoints import Checkpoints
from xlformer.runs.locks import WorkdirLock
from xlformer.training import start
from xlformer.training.loop import Loop

# What is no defect of the program but of the place: one line says so. Other errors of
# the operating system keep their traceback.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def train(
    config: ConfigDict,
    workdir,
    model: models.Model | None = None,
    *,
    started: float | None = None,
) -> dict:
    """Trains, or resumes, until config.train.steps.

    Where jax.distributed is initialized all hosts must call it, with equal arguments.

    Args:
      config: of `xlformer.config.load`, or default_config with your changes. Where
        its init_from names a work directory, a new run starts from those weights;
        `start.with_model` gives the config that fits them.
      workdir: of this run alone; made if missing (see runs/writing.py).
      model: your own, in place of models.build(config.model), whose fields then mean
        nothing. Whatever reads the run afterwards needs it too.
      started: since when its time counts (goodput), in seconds since 1970; now.

    Returns:
      The last metrics: 'step', 'train/loss_nats', 'eval/nats_per_token' (of the last
      validation), 'goodput', 'interrupted' (a signal's name or None).

    Raises:
      UserError: bad input, a full disk, or a loss that is not finite.
    """
    workdir = storage.path(workdir)
    # What can be refused is refused before what costs time: the config, the directory,
    # the mesh, and only then is a corpus prepared and anything compiled.
    with faults.Interrupt(**_signals()) as interrupt:
        config = _sealing(config, model)
        outline = model or config_lib.outline(config)
        config_lib.check(config, outline)
        config, begun = _gone_on(config, workdir)
        # The devices share the rows of one micro-batch: data=-1 takes no more of them.
        rows = config.train.batch_size // config.train.micro_batches
        mesh = sharding.make_mesh(config.mesh, rows=rows)
        sharding.check(config, mesh)
        outline.check_mesh(mesh)
        if hosts.is_first():
            writing.refuse_foreign(workdir)
        prepared, source = _data(config, workdir, mesh, model, begun)
        loop = Loop(
            config,
            workdir,
            _fitting(model, config, prepared.vocabulary.size),
            prepared,
            mesh,
            stop=hosts.Stop(interrupt),
            interrupt=interrupt,
            source=source,
        )
        with _saying_what_is_left(workdir):
            return _held(loop, config, workdir, prepared, started)


@contextlib.contextmanager
def _saying_what_is_left(workdir: epath.Path):
    """Raises UserError where a disk is full, with the step that is safe on it."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        left = Checkpoints(workdir / runs.CHECKPOINTS, read_only=True).latest()
        raise UserError(
            f"{workdir}: cannot be written: {error}; the latest checkpoint is "
            f"{'none' if left is None else f'step {left}'}"
        ) from error


def _held(loop: Loop, config, workdir, prepared, started) -> dict:
    """Runs the loop while this process holds the directory and is watched."""
    with contextlib.ExitStack() as stack:
        first = hosts.is_first()
        # The lock is taken first and given back last, around all that writes.
        lock = stack.enter_context(WorkdirLock(workdir)) if first else None
        writer = stack.enter_context(log.Writer(workdir, enabled=first))
        watchdog = stack.enter_context(_watchdog(config, workdir))
        clock = goodput.Clock(writer.write, started=started)
        # Hosts with another config or text would train something that nobody asked for,
        # or wait for each other in a collective that only some of them reach.
        with watchdog.allow(config.hosts.phase_limit, "agreeing"):
            hosts.agree(
                workdir,
                config=config_lib.to_json(config),
                text=prepared.card["payload_sha256"],
            )
        return loop.start(writer=writer, lock=lock, watchdog=watchdog, clock=clock)


# The config ---------------------------------------------------------------------------


def _sealing(config: ConfigDict, model: models.Model | None) -> ConfigDict:
    """`config` as checkpoints shall hold it: it says which model is trained.

    Of a model of one's own it has the name of the class, so that nobody who reads the
    run builds another; one of ours that was passed puts its fields into config.model.
    """
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(f"config is a {kind}, not what xlformer.config.load returns")
    name = resume.own_name(model)
    if config.own_model not in ("", UNSAID, name):
        raise UserError(
            f"config.own_model={config.own_model!r}, but model= is "
            f"{'not given' if model is None else type(model).__qualname__}: this "
            "config is of a run with a model of one's own, which train(config, "
            "workdir, model=...) must get again"
        )
    # A copy, since the caller's config stays as it is; locked again, so that a misspelt
    # field is an error and not a new one.
    config = ConfigDict(config.to_dict())
    config.own_model = name
    if model is not None and not name:
        (kind,) = (n for n, c in models.MODELS.items() if c is type(model))
        said = {"vocab_size": config.model.vocab_size}  # None leaves it to the data
        own = dataclasses.asdict(model.config)
        config.model = ConfigDict({"name": kind, **own, **said})
    config.lock()
    return config


def _gone_on(config: ConfigDict, workdir: epath.Path) -> tuple[ConfigDict, bool]:
    """The config that the run goes on with, and whether it has begun already.

    Raises UserError where `config` would make something else of the run.
    """
    # Only read: a manager would clean up, and the lock is not held yet.
    checkpoints = Checkpoints(workdir / runs.CHECKPOINTS, read_only=True)
    old = resume.sealed(workdir, checkpoints)
    if old is not None:
        resume.check(workdir, old, config)
        if config.init_from not in ("", old.init_from) and hosts.is_first():
            line = f"the run has begun: --init_from={config.init_from} is not read"
            print(line, file=sys.stderr, flush=True)
        config = resume.gone_on(old, config)
    if config.init_from:
        config = start.with_every_word(config)
    return config, old is not None


# Data and model -----------------------------------------------------------------------


def _data(config, workdir, mesh, model, begun: bool):
    """The prepared text, and what loads the weights that a new run starts from.

    With init_from the text is in the ids of those weights, and of the run later on.
    """
    prepared: Prepared = preparing.prepare(config.data)
    if not config.init_from:
        return prepared, None
    # What the run began from may have moved or changed since: its own copy counts.
    if begun:
        own = vocabularies.load(workdir / runs.VOCABULARY)
        where = Argument("workdir", workdir)
        return translation.translated(prepared, own, where=where), None
    source = start.Source.parse(config.init_from, workdir)
    where = Argument("init_from", config.init_from)
    prepared = translation.translated(prepared, source.vocabulary(), where=where)
    return prepared, functools.partial(source.load, mesh, model)


def _fitting(model: models.Model | None, config, symbols: int) -> models.Model:
    """The model to train, which must know every symbol of the data.

    One's own may know more; what reads a run of ours builds it for exactly these.
    """
    size = config_lib.vocab_size(config, symbols)
    if model is None:
        return models.build(config.model, size)
    if model.vocab_size < size or not config.own_model and model.vocab_size != size:
        more = f" and {size - symbols} for config.train.objective" * (size > symbols)
        raise UserError(
            f"the model knows {model.vocab_size} ids, the data has {symbols}{more}"
        )
    return model


# The process --------------------------------------------------------------------------


def _signals() -> dict:
    """Which signals this process handles itself.

    Among several hosts JAX's preemption service has SIGTERM: whichever host gets it,
    all of them save at the same step, about a second later. It is there only with
    jax.distributed, and without it SIGTERM would kill a process that has saved nothing.
    """
    if jax.process_count() == 1:
        return {}
    return {"signals": [signal.SIGINT], "instead": signal.SIGTERM}


def _watchdog(config, workdir) -> Watchdog:
    return Watchdog(
        workdir / writing.HEARTBEATS,
        jax.process_index(),
        jax.process_count(),
        timeout_s=config.hosts.heartbeat,
        say=hosts.say,
    )
