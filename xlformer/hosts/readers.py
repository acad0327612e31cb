"""Commands that only read a run, as a job of several hosts: joined, and one voice."""

from __future__ import annotations

import contextlib
import os
import signal

import jax

from xlformer import config as config_lib
from xlformer import runs
from xlformer.errors import UserError
from xlformer.hosts import job


@contextlib.contextmanager
def reading(args, workdir):
    """Surrounds a command that only reads a run, be it on one host or on several.

    Of several hosts only the first prints. args: of the command, with what add_flags
    has added. Raises UserError where hosts see another run or are told something else.
    """
    limits = config_lib.default_config().hosts
    with job.leaving_at_once():
        # Without the workdir: a training may be at work in it, whose heartbeats lie
        # there.
        job.join(
            args,
            workdir=None,
            start_limit=limits.start_limit,
            heartbeat=limits.heartbeat,
        )
        # Asked second: it starts JAX, whose CPU devices the command may want to count.
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            yield
            return
        # JAX's preemption service has taken the signal over for those who have to save.
        # Here there is nothing to save: SIGTERM ends the process.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # The one flag that differs between the hosts of a job.
        told = {k: v for k, v in vars(args).items() if k != "process_id"}
        job.same(command=repr(sorted(told.items())), run=_seen(workdir))
        with contextlib.ExitStack() as stack:
            if not job.is_first():
                nothing = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nothing))
            yield


def _seen(workdir) -> str:
    """The config of a run, or the reason why there is none.

    A host that does not see the directory would end alone, and leave the others
    waiting.
    """
    try:
        return config_lib.to_json(runs.read_config(workdir))
    except UserError as error:
        return str(error)
