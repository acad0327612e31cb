"""Trains a model: python -m xlformer.train --config=NAME --workdir=DIR.

A second call with the same directory resumes, and does bit by bit what an uninterrupted
run would have done; on another number of devices, but for the order of sums. Each host
of a job makes the same call.

From Python it is `xlformer.train.train(config, workdir, model=None)`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys

import jax

from xlformer import command, hosts, storage
from xlformer import config as config_lib
from xlformer.errors import INTERRUPTED
from xlformer.machines import cores
from xlformer.runs import goodput, writing
from xlformer.training import start
from xlformer.training.run import train

__all__ = ["keep_heap_small", "main", "train"]

M_ARENA_MAX = -8  # from glibc's malloc.h


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.train", description=__doc__)
    parser.add_argument("--config", required=True, help="NAME[:args] or FILE.py[:args]")
    parser.add_argument("--workdir", required=True, type=command.place)
    parser.add_argument(
        "--init_from",
        metavar="DIR[:best|latest|average:N|STEP]",
        help="start from the weights, model and vocabulary of another run, or of a "
        "directory of convert",
    )
    parser.add_argument(
        "--manual_dir", type=command.place, help="where archives lie that you fetched"
    )
    cores.add_flag(parser)
    hosts.add_flags(parser)
    args, overrides = parser.parse_with_overrides(argv)
    config = config_lib.load(args.config, overrides)
    if args.manual_dir is not None:
        config.data.manual_dir = args.manual_dir
    workdir = storage.path(args.workdir)
    # Before anything is downloaded, prepared or compiled.
    writing.refuse_foreign(workdir)
    storage.check_writable(workdir, "workdir")
    init_from = config.init_from if args.init_from is None else args.init_from
    if args.init_from is not None or init_from:
        config = start.with_model(config, init_from, workdir, overrides)
    with hosts.leaving_at_once():
        # Before any device is used: JAX cannot join hosts afterwards.
        hosts.join(
            args,
            workdir=workdir,
            start_limit=config.hosts.start_limit,
            heartbeat=config.hosts.heartbeat,
        )
        cores.prepare_training(config, asked=args.cpu_devices, sizes=config.mesh)
        _keep_compiled(workdir)
        keep_heap_small()
        result = train(config, workdir, started=goodput.process_start())
    if hosts.is_first():
        print(json.dumps(result))
    return INTERRUPTED if result["interrupted"] else 0


def _keep_compiled(workdir) -> None:
    """Makes a restarted run find its compiled programs in the work directory."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(workdir / writing.COMPILED))


def keep_heap_small() -> None:
    """Gives malloc two arenas: more grow with every save, whose threads come and go.

    2,000 steps with 100 saves of 6.5 MiB made the resident size grow by 3.4 % from step
    500 on, with two arenas by 0.5 to 1.5 % (tests/soak/memory.py; 2 cores, 2026-11-22).
    """
    # Another libc has no mallopt.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
