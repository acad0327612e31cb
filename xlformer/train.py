"""Trains a model: python -m xlformer.train --config=NAME --workdir=DIR.

The story, from top to bottom: config -> hosts -> mesh -> data -> model -> loop. A
second call with the same directory resumes, and does bit by bit what an uninterrupted
run would have done. Each host of a job makes the same call.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import signal
import sys

import jax
from ml_collections import ConfigDict

from xlformer import command, fields, hosts, models, runs, sharding, storage
from xlformer import config as config_lib
from xlformer.data import preparing, translation, vocabularies
from xlformer.errors import Argument, UserError
from xlformer.hosts import faults
from xlformer.hosts.watchdog import Watchdog
from xlformer.runs import goodput, log, resume, writing
from xlformer.runs.checkpoints import Checkpoints
from xlformer.runs.locks import WorkdirLock
from xlformer.training import start
from xlformer.training.loop import Loop

M_ARENA_MAX = -8  # malloc.h
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
      workdir: of this run alone; made if missing (see workdirs.py).
      model: your own, in place of models.build(config.model).
      started: since when its time counts (goodput), in seconds since 1970; now.

    Returns:
      The last metrics: 'step', 'train/loss_nats', 'eval/nats_per_token' (of the last
      validation), 'goodput', 'interrupted' (a signal's name or None).

    Raises:
      UserError: bad input, a full disk, or a loss that is not finite.
    """
    workdir = storage.path(workdir)
    with faults.Interrupt(**_signals()) as interrupt:
        config_lib.check(config)
        directory = workdir / runs.CHECKPOINTS
        old = resume.sealed(workdir, Checkpoints(directory, read_only=True))
        if old is not None:
            resume.check(workdir, old, config)
            config = _gone_on(old, config)
        if config.init_from:
            config = start.with_every_word(config)
        rows = config.train.batch_size // config.train.micro_batches
        mesh = sharding.make_mesh(config.mesh, rows=rows)
        sharding.check(config, mesh)
        symbols = config.model.vocab_size or fields.LARGEST  # the data will say
        (model or models.build(config.model, symbols)).check_mesh(mesh)
        if hosts.is_first():
            writing.refuse_foreign(workdir)
        prepared, source = preparing.prepare(config.data), None
        if config.init_from:
            source, prepared = _source(config, workdir, prepared, mesh, old is None)
        size = prepared.vocabulary.size
        model = model or models.build(config.model, vocab_size=size)
        if model.vocab_size < size:
            raise UserError(
                f"the model knows {model.vocab_size} ids, the data has {size}"
            )
        stop = hosts.Stop(interrupt)
        loop = Loop(
            config,
            workdir,
            model,
            prepared,
            mesh,
            stop=stop,
            interrupt=interrupt,
            source=source,
        )
        try:
            with contextlib.ExitStack() as stack:
                first = hosts.is_first()
                lock = stack.enter_context(WorkdirLock(workdir)) if first else None
                writer = stack.enter_context(log.Writer(workdir, enabled=first))
                watchdog = stack.enter_context(_watchdog(config, workdir))
                clock = goodput.Clock(writer.write, started=started)
                with watchdog.allow(config.hosts.phase_limit, "agreeing"):
                    hosts.agree(
                        workdir,
                        config=config_lib.to_json(config),
                        text=prepared.card["payload_sha256"],
                    )
                return loop.start(
                    writer=writer, lock=lock, watchdog=watchdog, clock=clock
                )
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            left = Checkpoints(directory, read_only=True).latest()
            raise UserError(
                f"{workdir}: cannot be written: {error}; the latest checkpoint is "
                f"{'none' if left is None else f'step {left}'}"
            ) from error


def _gone_on(old: ConfigDict, config: ConfigDict) -> ConfigDict:
    """The config of a run that has begun: where it began is not changed any more.

    Nor is the least count of a word, where none is given: its default was 1 once.
    """
    if config.init_from not in ("", old.init_from) and hosts.is_first():
        line = f"the run has begun: --init_from={config.init_from} is not read"
        print(line, file=sys.stderr, flush=True)
    config = ConfigDict(config.to_dict())
    config.init_from = old.init_from
    config.data.min_count = config.data.min_count or old.data.min_count
    config.lock()
    return config


def _source(config, workdir, prepared, mesh, fresh: bool):
    """What loads the run to start from, None if this one has begun; the text in its
    ids."""
    if not fresh:
        own = vocabularies.load(workdir / runs.VOCABULARY)
        where = Argument("workdir", workdir)
        return None, translation.translated(prepared, own, where=where)
    source = start.Source.parse(config.init_from, workdir)
    where = Argument("init_from", config.init_from)
    prepared = translation.translated(prepared, source.vocabulary(), where=where)
    return functools.partial(source.load, mesh), prepared


def _signals() -> dict:
    """Among several hosts JAX's preemption service has SIGTERM, and stops them all."""
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


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.train", description=__doc__)
    parser.add_argument("--config", required=True, help="NAME[:args] or FILE.py[:args]")
    parser.add_argument("--workdir", required=True, type=command.place)
    parser.add_argument(
        "--init_from",
        metavar="DIR[:best|latest|STEP]",
        help="start from the weights, model and vocabulary of another run, or of a "
        "directory of convert",
    )
    parser.add_argument(
        "--manual_dir", type=command.place, help="where archives lie that you fetched"
    )
    hosts.add_flags(parser)
    args, overrides = parser.parse_with_overrides(argv)
    config = config_lib.load(args.config, overrides)
    if args.manual_dir is not None:
        config.data.manual_dir = args.manual_dir
    workdir = storage.path(args.workdir)
    writing.refuse_foreign(workdir)
    storage.check_writable(workdir, "workdir")
    init_from = config.init_from if args.init_from is None else args.init_from
    if args.init_from is not None or init_from:
        config = start.with_model(config, init_from, workdir, overrides)
    with hosts.leaving_at_once():
        hosts.join(
            args,
            workdir=workdir,
            start_limit=config.hosts.start_limit,
            heartbeat=config.hosts.heartbeat,
        )
        _keep_compiled(workdir)
        keep_heap_small()
        result = train(config, workdir, started=goodput.process_start())
    if hosts.is_first():
        print(json.dumps(result))
    return faults.INTERRUPTED if result["interrupted"] else 0


def _keep_compiled(workdir) -> None:
    """A restarted run finds its programs in the work directory."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(workdir / writing.COMPILED))


def keep_heap_small() -> None:
    """glibc's own arenas grow with every save: the writing threads come and go.

    2,000 steps with 100 saves of 6.5 MiB made the resident size grow by 3.4 % from step
    500 on, with two arenas by 0.5 to 1.5 % (tests/soak/memory.py; 2 cores, 2026-11-22).
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
