"""The checkpoints of a run as they come, for whoever reads beside its training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import jax

from xlformer import models, storage, streams
from xlformer.errors import UserError
from xlformer.runs import checkpoints as checkpoints_lib
from xlformer.runs import reading
from xlformer.runs.checkpoints import Checkpoints
from xlformer.runs.integrity import Corrupt

# Seconds between two looks: listing a directory, which training does not notice, and
# short beside the minutes that lie between two checkpoints.
POLL_S = 10.0


def follow(
    workdir,
    *,
    params: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    model: models.Model | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[reading.Run]:
    """Each checkpoint of a run, the oldest first, until that of config.train.steps.

    Those that are there already come too. One that is deleted before it could be read,
    because training keeps only so many, or that is damaged, is passed over with a line.
    Arguments are those of `load`; sleep is called with POLL_S between two looks.
    """
    workdir = storage.path(workdir)
    checkpoints = Checkpoints(workdir / reading.CHECKPOINTS, read_only=True)
    # `done` holds what was scored or given up, `doubtful` what was seen broken once: a
    # checkpoint that is being deleted may be whole, half there or gone.
    done, doubtful = set(), set()
    while True:
        # Read anew: a run that is resumed may have got more steps to do.
        total = reading.read_config(workdir).train.steps
        steps = checkpoints.steps()
        done &= set(steps)  # A run that was set back comes to a step again.
        waiting = [step for step in steps if step not in done]
        # All hosts do what the first one decides, or some would wait for ever.
        step = reading.agreed(waiting[0] if waiting else None)
        if step is None:
            if reading.agreed(max(done, default=0)) >= total:
                return
            sleep(POLL_S)
            continue
        run, fault = _load(
            workdir, checkpoints, step, params=params, mesh=mesh, model=model
        )
        if not checkpoints_lib.on_any_host(run is None):
            done.add(step)
            yield run
            del run  # or its parameters would lie beside the next one's
        elif reading.agreed(int(step in checkpoints.steps())) == 0:
            _say(f"the checkpoint of step {step} was deleted: it is not scored")
        elif step in doubtful:
            done.add(step)
            _say(f"{fault}: step {step} is not scored")
        else:  # It may be on its way out, with some of its files gone.
            doubtful.add(step)
            sleep(POLL_S)


def _load(
    workdir, checkpoints: Checkpoints, step: int, **options
) -> tuple[reading.Run | None, str]:
    """The run, or why its checkpoint cannot be read; other errors are the caller's."""
    try:
        return reading.load(workdir, checkpoint=str(step), **options), ""
    except UserError as error:
        there = step in checkpoints.steps()
        if there and not isinstance(error.__cause__, Corrupt):
            raise
        return None, str(error)


def _say(line: str) -> None:
    if jax.process_index() == 0:
        streams.say(line)
