"""Trains a model: python -m xlformer.train --config=NAME --workdir=DIR.

The story, from top to bottom: config -> data -> model -> state -> loop -> checkpoint.
A second call with the same directory resumes, and does bit by bit what an uninterrupted
run would have done.
"""

from __future__ import annotations

import errno
import json
import sys
import time

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from xlformer import command, models, prepare, runs, workdirs
from xlformer import config as config_lib
from xlformer.data.stream import Stream
from xlformer.errors import UserError
from xlformer.training import faults, metrics, optimizers, state, steps
from xlformer.training.checkpoints import Checkpoints
from xlformer.training.locks import WorkdirLock
from xlformer.training.profiler import Profiler
from xlformer.training.progress import Progress
from xlformer.validation import Validation

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def train(config: ConfigDict, workdir, model: models.Model | None = None) -> dict:
    """Trains, or resumes, until config.train.steps.

    Args:
      config: of `xlformer.config.load`, or default_config with your changes.
      workdir: of this run alone; made if missing (see workdirs.py).
      model: your own, in place of models.build(config.model).

    Returns:
      The last metrics: 'step', 'train/loss_nats', 'eval/nats_per_token' (of the last
      validation), 'interrupted' (a signal's name or None).

    Raises:
      UserError: bad input, a full disk, or a loss that is not finite.
    """
    workdir = epath.Path(workdir)
    with faults.Interrupt() as interrupt:
        steps.check(config)
        workdirs.refuse_foreign(workdir)
        prepared = prepare.prepare(config.data)
        size = prepared.vocabulary.size
        model = model or models.build(config.model, vocab_size=size)
        if model.vocab_size < size:
            raise UserError(
                f"the model knows {model.vocab_size} ids, the data has {size}"
            )
        run = _Training(config, workdir, model, prepared, interrupt)
        try:
            with WorkdirLock(workdir), metrics.Writer(workdir) as writer:
                return run.start(writer)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise UserError(f"{workdir}: cannot be written: {error}") from error


class _Training:
    """One process's part of a run. Whatever must survive it is in self.state."""

    def __init__(self, config, workdir, model, prepared, interrupt):
        train = config.train
        self.config, self.workdir, self.model = config, workdir, model
        self.prepared, self.interrupt = prepared, interrupt
        self.optimizer = optimizers.build(config.optimizer)
        schedule = optimizers.learning_rate(config.optimizer, train.steps)
        self.stream = Stream(
            prepared.tokens["train"],
            batch_size=train.batch_size,
            segment_length=train.segment_length,
            extended_length=model.extended_length,
            documents=prepared.documents["train"],
            variable_length=train.variable_length,
            seed=config.seed,
        )
        self.step_fn = steps.make_step(config, model, self.optimizer, schedule)
        self.validation = Validation(config, model, prepared)
        self.plateau = steps.make_plateau(config)
        self.profiler = Profiler(config, workdir / workdirs.PROFILE)
        self.calls = {}  # compiled steps by how many segments one call takes
        self.pending = None  # (step, metrics) of the last call, not yet read

    def start(self, writer) -> dict:
        self.writer = writer
        self.progress = Progress(self.config, writer, self.validation.score)
        total = self.config.train.steps
        with Checkpoints(
            self.workdir / runs.CHECKPOINTS, keep=self.config.train.keep
        ) as self.checkpoints:
            self.state, self.step = self._state()
            workdirs.describe(self.workdir, self.config, self.prepared)
            logged = workdirs.last_metrics(self.workdir, self.step)
            self.result = {"step": self.step, "interrupted": None, **logged}
            if self.step >= total and not self._owes_validation():
                self._say(f"the run is complete: {self.step} of {total} steps")
                return self.result
            self._introduce()
            self.validation.compile(self.state.params)
            if self.step < total:
                self._compiled(self._next_count())
            try:
                self._loop()
            finally:
                self._say(self.profiler.stop())
            self.checkpoints.wait()
        return self.result

    # State ---------------------------------------------------------------------------

    def _state(self):
        """The restored state, or a fresh one where there is no checkpoint."""

        def create(key):
            return state.create(self.config, self.model, self.optimizer, key)

        key = jax.random.key(self.config.seed)
        if not self.checkpoints.steps():
            self._say("no checkpoint: starting from fresh parameters")
            return jax.jit(create)(key), 0
        workdirs.check_same_data(self.workdir, self.prepared)
        step, found, _ = self.checkpoints.restore(jax.eval_shape(create, key))
        if step:
            place = self.stream.place(step - 1)
            workdirs.check_place(self.workdir, step, found.data, place)
        self._say(f"resuming from the checkpoint of step {step}")
        return found, step

    def _save(self, metric=None, *, replace=False):
        with self.progress.pause():
            self.checkpoints.save(
                self.step,
                self.state,
                config=self.config.to_dict(),
                metric=metric,
                replace=replace,
            )

    # The loop ------------------------------------------------------------------------

    def _loop(self):
        train = self.config.train
        self.progress.restart()
        if self._owes_validation():
            # The checkpoint lacks what comes of it. (No signal waits here: not armed.)
            self._save(self._validate(), replace=True)
        while self.step < train.steps and not self.interrupt.requested:
            count = self._next_count()
            self._profile()
            batch = self._batch(count)
            self.state, found = self._compiled(count)(self.state, batch)
            self._read()  # Of the call before: a lag of one.
            self.step += count
            self.pending = (self.step, found)
            if not self.interrupt.armed:
                self._read()
                self.interrupt.armed = True  # From now on there is something to save.
            metric = None
            if _due(self.step, train.eval_every) or self.step >= train.steps:
                metric = self._validate()
            if (
                metric is not None
                or _due(self.step, train.save_every)
                or self.step >= train.steps
            ):
                self._read()
                self._save(metric)
        self._read()
        if self.interrupt.requested:
            self._save()
            self.checkpoints.wait()
            self.result["interrupted"] = self.interrupt.requested
            self._say(f"{self.interrupt.requested}: saved at step {self.step}")

    def _next_count(self) -> int:
        """Segments of the next call: never across a validation, a save or the end.

        Either segments_per_call or 1, so that two programs are compiled and no more; a
        function of the step alone, so that a resumed run makes the same calls.
        """
        train = self.config.train
        left = [train.steps - self.step]
        for every in (train.eval_every, train.save_every):
            if every:
                left.append(every - self.step % every)
        return train.segments_per_call if train.segments_per_call <= min(left) else 1

    def _batch(self, count):
        batches = [self.stream.at(s) for s in range(self.step, self.step + count)]
        if count == 1:
            return batches[0]
        return {name: np.stack([b[name] for b in batches]) for name in batches[0]}

    def _compiled(self, count):
        if count not in self.calls:
            function = self.step_fn if count == 1 else steps.make_steps(self.step_fn)
            with self.progress.pause():
                start = time.perf_counter()
                jitted = jax.jit(function, donate_argnums=0)
                lowered = jitted.lower(self.state, self._batch(count))
                self.calls[count] = lowered.compile()
                self._say(f"compiled the step in {time.perf_counter() - start:.1f} s")
        return self.calls[count]

    def _read(self):
        """Waits for the metrics of the last call, checks them, and logs when due."""
        if self.pending is None:
            return
        (step, found), self.pending = self.pending, None
        found = {name: np.atleast_1d(np.asarray(x)) for name, x in found.items()}
        losses, finite = found["train/loss_nats"], found["train/finite"]
        self._refuse_nonfinite(step - len(losses) + 1, found)
        self.progress.add(losses, finite)
        self.result["step"] = step
        if finite.any():
            self.result["train/loss_nats"] = float(losses[finite][-1])
        # A multiple of log_every may lie inside a call of several steps.
        every = self.config.train.log_every
        crossed = every and step // every > (step - len(losses)) // every
        if crossed or step >= self.config.train.steps:
            self.progress.log(step, {name: float(x[-1]) for name, x in found.items()})

    def _refuse_nonfinite(self, first_step, found):
        """Ends the run where config.train.skip_nonfinite does not help (any more)."""
        finite, in_a_row = found["train/finite"], found["train/skipped_in_a_row"]
        skips = self.config.train.skip_nonfinite
        lost = faults.too_many_skips(int(in_a_row.max())) if skips else True
        if finite.all() or not lost:
            return
        bad = int(np.argmin(finite))
        self.checkpoints.wait()  # The last good one may still be on its way.
        raise UserError(
            faults.nonfinite_message(
                step=first_step + bad,
                last_good=self.checkpoints.latest(),
                learning_rate=float(found["train/learning_rate"][bad]),
                config=self.config,
            )
        )

    def _owes_validation(self) -> bool:
        """A run that was interrupted in a validation does it after it is resumed."""
        every, total = self.config.train.eval_every, self.config.train.steps
        due = self.step and (_due(self.step, every) or self.step >= total)
        return bool(due) and int(self.state.evaluated) != self.step

    def _validate(self) -> float | None:
        """Loss of the validation split in nats per token; None if interrupted."""
        self._read()
        with self.progress.pause():
            # With an average of the parameters, that is what is meant to be used.
            params = self.state.params if self.state.ema is None else self.state.ema
            loss = self.validation.loss(params, lambda: bool(self.interrupt.requested))
            if loss is None:
                return None
            self.state = self.state._replace(
                plateau=self.plateau(self.state.plateau, loss),
                evaluated=jax.numpy.int32(self.step),
            )
            unit, score = self.validation.score(loss)
            values = {"eval/nats_per_token": loss, f"eval/{unit}": score}
            self.result.update(values)
            self.writer.write(self.step, values, kind="eval")
            self._say(f"step {self.step}  validation {unit} {score:.4f}")
        return loss

    # Around it -----------------------------------------------------------------------

    def _introduce(self):
        device = jax.devices()[0]
        self._say(f"jax {jax.__version__} on {device.device_kind} ({device.platform})")
        params, carried = self.state.params, self.state.carried
        self._say(metrics.parameter_table(params))
        self._say(metrics.memory_estimate(params, self.state.opt_state, carried))
        dtype = models.base.compute_dtype(self.config.model.dtype, params)
        self._say(f"computing in {dtype.name}; parameters and optimizer in float32")
        self._say(
            f"data: {self.prepared.card['corpus']}, "
            f"{len(self.prepared.tokens['train']):,} training tokens, "
            f"{self.prepared.vocabulary.size} symbols, an epoch is "
            f"{self.stream.steps_per_epoch:,} segments"
        )

    def _profile(self):
        if self.profiler.due(self.step):
            self._read()
            with self.progress.pause():
                self._say(self.profiler.follow(self.step))

    def _say(self, line):
        if line:
            self.writer.console(line)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.train", description=__doc__)
    parser.add_argument("--config", required=True, help="NAME[:args] or FILE.py[:args]")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--manual_dir", help="where archives lie that you fetched")
    args, overrides = parser.parse_with_overrides(argv)
    config = config_lib.load(args.config, overrides)
    if args.manual_dir is not None:
        config.data.manual_dir = args.manual_dir
    result = train(config, args.workdir)
    print(json.dumps(result))
    return faults.INTERRUPTED if result["interrupted"] else 0


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
