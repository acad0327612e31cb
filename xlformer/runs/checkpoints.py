"""Checkpoints: Orbax's CheckpointManager, and what it lacks: verification.

One step is one directory with three items, committed together or not at all:

    state    every leaf, as a nested dict of its path (params/layers/... -> array)
    config   the resolved config, JSON
    digest   JSON: see integrity.py

Whatever is wrong with a checkpoint, the previous one is used, and the log says so. The
refused one becomes STEP.corrupt, which nothing reads or deletes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from xlformer import storage
from xlformer.errors import UserError, WorthAnotherTry
from xlformer.runs.integrity import (
    Corrupt,
    cause,
    read_config,
    read_seal,
    read_state,
    seal,
)

METRIC = "nats_per_token"  # of the validation
# Orbax keeps JSON of its own beside a step, which is not sealed and may hold anything.
UNREADABLE = OSError, ValueError, TypeError, LookupError, AttributeError
UNREADABLE += ArithmeticError, RecursionError
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one work directory: save, restore, verify, fall back.

    Keeps the `keep` latest steps and, besides, the best: the one whose metric is lowest
    among those that were measured as the newest was, with the same section `eval` of
    their config. The best of earlier settings is kept too. One process (or one job)
    writes; any number read with read_only=True.
    """

    def __init__(self, directory, *, keep: int = 2, read_only: bool = False):
        if keep < 1:
            raise UserError(f"config.train.keep={keep}: at least one must be kept")
        # Orbax wants an absolute path; absolute() would put gs:// below the cwd.
        directory = storage.path(directory)
        remote = storage.is_remote(directory)
        self.directory = directory if remote else directory.absolute()
        self._keep = keep
        self._current = None  # the step that this process restored or saved last
        # step -> (metric, how it was measured) or None, for the steps seen so far
        self._metrics: dict[int, tuple[float, Any] | None] = {}
        self._manager = None if read_only else self._open()

    def _open(self) -> ocp.CheckpointManager:
        # Not max_to_keep with best_fn: that keeps the best ones and deletes the newest
        # (Orbax 0.12.8; after steps 1 to 7, with 3 to keep, latest_step() was 4).
        # A kill while saving leaves N.orbax-checkpoint-tmp (found at 36 of 54
        # restarts), which by default nobody removes.
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            preservation_policy=_LatestAndBest(self._keep, self._bests),
            async_options=ocp.options.AsyncOptions(barrier_sync_fn=_barrier()),
        )
        try:
            return ocp.CheckpointManager(self.directory, options=options)
        except UNREADABLE as error:
            line = f"{self.directory}: cannot be opened: {cause(error)}"
            raise UserError(line) from error

    def close(self) -> None:
        self.wait()
        if self._manager:
            self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.close()
        elif jax.process_count() == 1:  # else it might wait for a host that is gone
            with contextlib.suppress(UserError):  # another error is on its way
                self.wait()  # a save that has begun is still worth having

    # Which steps there are -----------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps in ascending order, the one being saved included.

        [] where there are none, or no such directory.
        """
        if self._manager:
            return sorted(self._manager.all_steps())
        if not self.directory.is_dir():
            return []
        # Read anew each time: another process may be writing.
        names = ocp.path.step.standard_name_format()
        return sorted(found.step for found in names.find_all(self.directory))

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the lowest metric that compares, None if no step has one."""
        return next(iter(self._bests(self.steps())), None)

    def _bests(self, steps) -> list[int]:
        """The best step of each way of measuring, that of the newest metric first.

        Not Orbax's BestN: it reads metrics at start-up, where one damaged file of
        metrics would make every checkpoint unreachable.
        """
        for step in set(steps) - set(self._metrics):
            try:
                self._metrics[step] = self._measured(step)
            except Exception as error:
                _log.warning("step %d: its metric is unreadable: %s", step, error)
                self._metrics[step] = None
        found = {}
        for step in sorted(steps, reverse=True):
            if self._metrics[step] is not None:
                metric, how = self._metrics[step]
                found.setdefault(how, []).append((metric, step))
        return [min(of_one)[1] for of_one in found.values()]

    def _measured(self, step: int) -> tuple[float, Any] | None:
        sealed = read_seal(self._path(step))
        if METRIC not in sealed["metric"]:
            return None
        config = read_config(self._path(step), sealed)
        return sealed["metric"][METRIC], _how(config)

    # Saving --------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tree,
        *,
        config: Mapping,
        metric: float | None = None,
        replace: bool = False,
    ) -> bool:
        """Starts saving and returns once the state may be donated.

        metric: nats per token, of a validation with the settings of config['eval'].
        A failure of the previous save shows here or in wait(). Returns False, and saves
        nothing, for the step that this object restored or saved last, unless it is to
        replace it (a kill before that is done costs this one step). Steps after
        `step`, which a rewind or a fall back to it left behind, are deleted: they
        belong to a future that did not happen.
        """
        if self._manager is None:
            raise ValueError("opened with read_only=True")
        if step == self._current and not replace:
            return False
        # One save at a time: it goes on in a thread, beside the training.
        self.wait()
        # NaN would compare with nothing, and is no JSON.
        finite = metric is not None and math.isfinite(metric)
        named = {METRIC: float(metric)} if finite else {}
        arrays, digest = seal(tree, config=dict(config), metric=named)
        try:
            for stale in [s for s in self.steps() if s >= step]:
                _log.warning("deleting step %d, replaced by step %d", stale, step)
                self._manager.delete(stale)
                self._metrics.pop(stale, None)
            self._metrics[step] = (named[METRIC], _how(config)) if finite else None
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),
                    config=ocp.args.JsonSave(dict(config)),
                    digest=ocp.args.JsonSave(digest),
                ),
                force=True,  # the loop decides when, not Orbax
            )
        except Exception as error:
            self._fail(error)
        self._current = step
        return True

    def wait(self) -> None:
        """Returns when everything is on disk; raises UserError if it is not."""
        try:
            if self._manager:
                self._manager.wait_until_finished()
                self._manager.check_for_errors()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception):
        broken, self._current = self._manager, None
        if jax.process_count() > 1:
            # To close and to open one waits for all hosts, and this may be the only one
            # that failed. Its process ends.
            self._manager = None
        else:
            try:
                broken.close()
            except Exception:  # it repeats the error at hand
                pass
            self._manager = self._open()  # also removes what the failed save has left
        left = self.latest()
        # Among several hosts the death of another looks the same.
        kind = WorthAnotherTry if jax.process_count() > 1 else UserError
        raise kind(
            f"{self.directory}: saving failed ({cause(error)}); "
            f"the latest checkpoint is {'none' if left is None else f'step {left}'}"
        ) from error

    # Restoring -----------------------------------------------------------------------

    def restore(self, abstract, step: int | None = None):
        """Returns (step, tree, config) of the newest checkpoint that is intact.

        abstract: a tree of jax.ShapeDtypeStructs with the shardings wanted now, or of
        arrays, or what gives one for the names at the top of the saved tree. Leaves
        without a sharding go to the first device. With `step` only that one will do.
        A checkpoint of another model is no corruption: it raises UserError and nothing
        else is tried.
        """
        self.wait()
        if step is not None:
            self._must_exist(step)
        reasons, refused = [], []
        for candidate in reversed(self.steps() if step is None else [step]):
            try:
                found = self._restore_step(candidate, abstract)
            except Corrupt as error:  # on all hosts
                refused.append(candidate)
                reasons.append(f"step {candidate}: {error}")
                _log.error("%s: checkpoint refused: %s", self.directory, reasons[-1])
                continue
            if refused:
                _log.error("fell back to the checkpoint of step %d", candidate)
                self._set_aside(refused)
            self._current = candidate
            return candidate, *found
        raise UserError(self._nothing(reasons))

    def _set_aside(self, refused: list[int]) -> None:
        """Renames the steps that the writer gave up, once an older one is restored.

        The next save would delete them, and with them what shows what happened.
        """
        if self._manager is None:
            return
        if jax.process_index() == 0:
            for step in refused:
                try:
                    _log.error("step %d is set aside: %s", step, self._rename(step))
                except Exception as error:  # Of a network, or there is no right to.
                    _log.error("step %d stays: %s", step, cause(error))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("refused steps are set aside")
        self._manager.reload()

    def _rename(self, step: int) -> epath.Path:
        names = (f"{step}.corrupt{n or ''}" for n in itertools.count())
        free = next(x for x in map(self.directory.joinpath, names) if not x.exists())
        return self._path(step).rename(free)

    def restore_params(self, step: int | None, abstract: Mapping):
        """Restores a part of the saved tree: {'params': tree, 'ema': tree, ...}.

        Leaves whose abstract leaf has a sharding become jax.Arrays, the others numpy
        arrays, whatever devices saved them. step None is the latest. Raises UserError
        if the checkpoint is damaged: which one to score is the caller's decision.
        """
        return self._one(
            step, lambda path, sealed: read_state(path, sealed, abstract, whole=False)
        )

    def config(self, step: int | None = None) -> dict:
        """The config saved with a step (default: the latest), verified."""
        return self._one(step, read_config)

    def contents(self, step: int) -> set[str]:
        """The names at the top of a saved tree: 'step', 'params', 'carried', ..."""
        return self._one(step, lambda _, sealed: _tops(sealed))

    def _one(self, step, read):
        step = self.latest() if step is None else step
        self._must_exist(step)
        try:
            return read(self._path(step), read_seal(self._path(step)))
        except Corrupt as error:
            raise UserError(self._nothing([f"step {step}: {error}"])) from error

    def _must_exist(self, step) -> None:
        if step is None or step not in self.steps():
            which = "" if step is None else f" of step {step}"
            have = ", ".join(map(str, self.steps()))
            have = f"; there are steps {have}" if have else ""
            raise UserError(f"{self.directory}: there is no checkpoint{which}{have}")

    def _nothing(self, reasons) -> str:
        if not reasons:
            return f"{self.directory}: there is no checkpoint"
        return f"{self.directory}: no intact checkpoint: {'; '.join(reasons)}"

    def _restore_step(self, step, abstract):
        path = self._path(step)
        # Before the arrays: in reading those, hosts wait for each other.
        sealed = _on_all_hosts(lambda: read_seal(path))
        config = _on_all_hosts(lambda: read_config(path, sealed))
        if callable(abstract):
            abstract = abstract(_tops(sealed))
        # Without any sharding Orbax reads only on as many devices as have saved
        # ("Topology mismatch detected").
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=getattr(x, "sharding", None) or default
            ),
            abstract,
        )
        tree = _on_all_hosts(lambda: read_state(path, sealed, placed, whole=True))
        return tree, config

    def _path(self, step) -> epath.Path:
        return self.directory / str(step)


def _tops(sealed: Mapping) -> set[str]:
    return {path.partition("/")[0] for path in sealed["layouts"]}


def _how(config: Mapping) -> str:
    """The settings with which a checkpoint's metric was measured, to be compared."""
    return json.dumps(config.get("eval"), sort_keys=True)


def _barrier():
    """Orbax's, at which a host that has failed does not wait for the others.

    They could not finish without it, and its own error would be told after ten minutes.
    """
    if jax.process_count() == 1:
        return None
    wait = ocp.multihost.get_barrier_sync_fn()

    def barrier(*, key: str, timeout_ms: int) -> None:
        error = sys.exception()  # on the way out of a save
        if error is not None:
            raise error
        wait(key=key, timeout_ms=timeout_ms)

    return barrier


class _LatestAndBest(checkpoint_managers.PreservationPolicy):
    """The latest steps and the best ones; a step without a metric only as latest."""

    def __init__(self, latest: int, bests):
        self._latest, self._bests = latest, bests

    def should_preserve(self, checkpoints, *, context):
        del context
        steps = [c.step for c in checkpoints]
        kept = {*steps[-self._latest :], *self._bests(steps)}
        return [s in kept for s in steps]


def _on_all_hosts(read):
    """What `read` returns; Corrupt where it raises that on any host."""
    found, fault = None, ""
    try:
        found = read()
    except Corrupt as error:
        fault = str(error)
    # Asked even where nothing is wrong here: all hosts make the same calls.
    if on_any_host(bool(fault)):
        raise Corrupt(fault or "refused elsewhere")
    return found


def on_any_host(failed: bool) -> bool:
    """Hosts must agree on the step, even if the files of only one are damaged."""
    if jax.process_count() == 1:
        return failed
    return bool(multihost_utils.process_allgather(np.array(failed)).any())
