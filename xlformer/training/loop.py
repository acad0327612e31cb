"""The loop of training: steps, validations, saves, and what may come in between."""

from __future__ import annotations

import contextlib
import functools
import time

import jax
import numpy as np

from xlformer import config as config_lib
from xlformer import hosts, runs, sharding
from xlformer.data.stream import Stream
from xlformer.hosts import faults
from xlformer.runs import goodput, resume, writing
from xlformer.runs.checkpoints import Checkpoints
from xlformer.scoring.validation import Validation
from xlformer.training import optimizers, spikes, start, state, steps
from xlformer.training.compiling import TrainingStep
from xlformer.training.profiler import Profiler
from xlformer.training.progress import Progress, introduction


class Loop:
    """One process's part of a run. Whatever must survive it is in self.train_state.

    All hosts make the same calls in the same order, because each may be one for all.
    """

    def __init__(
        self, config, workdir, model, prepared, mesh, *, stop, interrupt, source=None
    ):
        train = config.train
        self.config, self.workdir, self.model = config, workdir, model
        self.prepared, self.mesh = prepared, mesh
        self.stop, self.interrupt = stop, interrupt
        self.source = source  # loads a runs.Run, to start from its weights
        self.training_step = TrainingStep(config, model, mesh)
        self.rows = sharding.Rows(mesh, train.batch_size)
        self.stream = Stream(
            prepared.tokens["train"],
            batch_size=train.batch_size,
            segment_length=train.segment_length,
            extended_length=model.extended_length,
            documents=prepared.documents["train"],
            variable_length=train.variable_length,
            seed=config.seed,
            rows=self.rows.mine,
            record=prepared.card.get("record", 1),
        )
        self.validation = Validation(config, model, prepared, mesh)
        self.evaluated = jax.jit(
            steps.make_evaluated(config.optimizer),
            out_shardings=sharding.replicated(mesh),
        )
        self.profiler = Profiler(
            workdir / writing.PROFILE,
            first=train.profile_start,
            steps=train.profile_steps,
        )
        self.calls = {}  # compiled steps by how many segments one call takes
        self.pending = None  # (step, metrics) of the last call, not yet read
        self.sealed = config  # of the checkpoint that the run goes on from

    def start(self, *, writer, lock, watchdog, clock) -> dict:
        """Trains to the end, or until it is stopped; returns the last metrics.

        lock: of the work directory, on the first host; None elsewhere. What is given
        belongs to the caller, who closes it.
        """
        self.writer, self.lock = writer, lock
        self.watchdog, self.clock = watchdog, clock
        self.progress = Progress(self.config.train, writer, self.validation.score)
        total = self.config.train.steps
        with Checkpoints(
            self.workdir / runs.CHECKPOINTS, keep=self.config.train.keep
        ) as self.checkpoints:
            # Fresh parameters are made, and nothing restored, where none are saved.
            with self._phase("restoring" if self.checkpoints.steps() else "start_up"):
                self.train_state, self.step = self._restored()
            self.writer.rewind(self.step)
            self.skips = spikes.skipped(self.train_state.spikes)
            logged = writing.last_metrics(self.workdir, self.step)
            self.result = {"step": self.step, "interrupted": None, **logged}
            self.clock.record(self.step)
            if self.step >= total and not self._owes_validation():
                self._say(resume.complete(self.sealed, self.config, self.step))
                return self.result
            if hosts.is_first():
                writing.describe(self.workdir, self.config, self.prepared)
            self._introduce()
            # The validation too: compiled later, it would make a signal wait.
            with self._phase("compiling"):
                self.validation.compile(self._scored())
                if self.step < total:
                    self._compiled(self._next_count())
            with self.clock.measure("steps"):
                try:
                    self._loop()
                finally:
                    self._say(self.profiler.stop())
            with self._phase("saving"):
                self.checkpoints.wait()
            self._conclude()
        return self.result

    # State ---------------------------------------------------------------------------

    def _restored(self):
        """The restored state, or a fresh one where there is no checkpoint."""
        if not self.checkpoints.steps():
            return self._begin(), 0
        writing.check_same_data(self.workdir, self.prepared)
        key = jax.random.key(self.config.seed)
        step, found, sealed = self.training_step.restored(self.checkpoints, key)
        where = f"{self.workdir}: config of step {step}"
        self.sealed = config_lib.from_dict(sealed, where=where)
        resume.check(self.workdir, self.sealed, self.config)
        if step:
            last = spikes.data_index(step - 1, spikes.skipped(found.spikes))
            place = self.stream.place(last)
            writing.check_place(self.workdir, step, found.data, place)
        return state.resumed(found, self.sealed, self.config), step

    def _begin(self):
        """The state before the first step: fresh, or with another run's parameters."""
        create, placed = self.training_step.create, self.training_step.placed
        key = jax.random.key(self.config.seed)
        if self.source is None:
            self._say("no checkpoint: starting from fresh parameters")
            # With the mesh, as its shapes were asked for: it is traced already.
            with jax.set_mesh(self.mesh):
                return jax.jit(create, out_shardings=placed)(key)
        run = self.source()  # Again after a spike before the first save.
        create = start.from_weights(create, self.config, self.model, run)
        for line in start.lines(self.config, run, self.prepared):
            self._say(line)
        return jax.jit(create, out_shardings=placed)(key, run.params)

    def _save(self, metric=None, *, replace=False):
        with self._phase("saving"):
            self._check_lock()
            self.writer.flush()  # what a checkpoint knows, the log knows too
            self.checkpoints.save(
                self.step,
                self.train_state,
                config=config_lib.to_dict(self.config),
                metric=metric,
                replace=replace,
            )
        self.clock.record(self.step)

    def _roll_back(self, spike: spikes.Spike):
        """To the last checkpoint, which has seen no spike, and around the segment."""
        index = spikes.data_index(spike.step - 1, self.skips)
        # What is still in flight has learnt from the spike. Its steps are recorded as
        # made first, so that the earlier step that follows makes them repeated ones.
        self.pending = None
        self.clock.record(spike.step)
        with self._phase("restoring"):
            self.checkpoints.wait()
            self.train_state, self.step = self._restored()
            self.writer.rewind(self.step)
            # Also those that this process has left out since: see spikes.py.
            left_out = spikes.add(self.train_state.spikes, *self.skips, index)
            self.train_state = self.train_state._replace(spikes=left_out)
            self.skips = spikes.skipped(left_out)
        self._say(
            f"the loss of step {spike.step} is {spike.ratio:.2f} times its average: "
            f"back to step {self.step}, leaving out segment {index}"
        )
        values = {"spike/at_step": spike.step, "spike/ratio": spike.ratio}
        self.writer.write(self.step, values | {"spike/segment": index}, kind="spike")
        self.clock.record(self.step)

    # The loop ------------------------------------------------------------------------

    def _loop(self):
        self.progress.restart()
        if self._owes_validation():
            # The checkpoint lacks what comes of it. (No signal waits here: not armed.)
            self._save(self._validate(), replace=True)
        requested = self.stop.requested()
        while self.step < self.config.train.steps and not requested:
            try:
                self._advance()
                requested = self.stop.requested()
                if requested:
                    self._read()
            except spikes.Spike as spike:
                self._roll_back(spike)
        if requested:
            self._save()
            self.result["interrupted"] = requested
            self._say(f"{requested}: saved at step {self.step}")

    def _advance(self):
        """One call, and whatever is due after it."""
        train, count = self.config.train, self._next_count()
        self._profile()
        self.watchdog.beat("batch", self.step)
        batch = self._batch(count)
        self.watchdog.beat("step", self.step)
        self.train_state, found = self._compiled(count)(self.train_state, batch)
        # Of the call before, so that the device never waits for the host. Without any
        # wait 60 steps hung 8 virtual devices on 2 cores in 5 of 5 runs (jax 0.10.2).
        self._read()
        self.step += count
        self.pending = (self.step, found)
        if not self.interrupt.armed:
            # Until a first step has been made, a signal ends the process at once.
            self._read()
            self.interrupt.armed = True
        metric, last = None, self.step >= train.steps
        if _due(self.step, train.eval_every) or last:
            metric = self._validate()
        if metric is not None or _due(self.step, train.save_every) or last:
            self._read()
            self._save(metric)

    def _next_count(self) -> int:
        """Segments of the next call: never across a validation, a save or the end.

        Either segments_per_call or 1, so that two programs are compiled and no more; a
        function of the step alone, so that a resumed run makes the same calls.
        """
        train = self.config.train
        left = [train.steps - self.step]
        for every in (train.eval_every, train.save_every):
            if every:  # 0 is never
                left.append(every - self.step % every)
        return train.segments_per_call if train.segments_per_call <= min(left) else 1

    def _batch(self, count):
        waited = self.stream.waited
        batches = [
            spikes.batch(self.stream, step, self.skips)
            for step in range(self.step, self.step + count)
        ]
        self.clock.move("data_wait", self.stream.waited - waited)
        if count == 1:
            return self.rows.put(batches[0])
        stacked = {name: np.stack([b[name] for b in batches]) for name in batches[0]}
        return self.rows.put(stacked, axis=1)

    def _compiled(self, count):
        if count not in self.calls:
            with self._phase("compiling"):
                start = time.perf_counter()
                batch = self._batch(count)
                self.calls[count] = self.training_step.compile(batch, segments=count)
                self._say(f"compiled the step in {time.perf_counter() - start:.1f} s")
        return self.calls[count]

    def _read(self):
        """Waits for the metrics of the last call, checks them, and logs when due."""
        if self.pending is None:
            return
        (step, found), self.pending = self.pending, None
        found = {name: np.atleast_1d(np.asarray(x)) for name, x in found.items()}
        losses, finite = found["train/loss_nats"], found["train/finite"]
        first = step - len(losses) + 1
        if "spike/ratio" in found:
            spikes.check(first, found["spike/ratio"], self.config.train.spike_factor)
        self._refuse_nonfinite(first, found)
        self.progress.add(losses, finite)
        self.result["step"] = step
        if finite.any():
            self.result["train/loss_nats"] = float(losses[finite][-1])
        # A multiple of log_every may lie inside a call of several steps.
        every = self.config.train.log_every
        crossed = every and step // every > (first - 1) // every
        if crossed or step >= self.config.train.steps:
            self.progress.log(step, {name: float(x[-1]) for name, x in found.items()})
            self.clock.record(step)
            self._check_lock()

    def _refuse_nonfinite(self, first_step, found):
        """Ends the run where config.train.skip_nonfinite does not help (any more)."""
        finite, in_a_row = found["train/finite"], found["train/skipped_in_a_row"]
        skips = self.config.train.skip_nonfinite
        lost = faults.too_many_skips(int(in_a_row.max())) if skips else True
        if finite.all() or not lost:
            return
        bad = int(np.argmin(finite))
        self.checkpoints.wait()  # The last good one may still be on its way.
        raise faults.NotFinite(
            faults.nonfinite_message(
                step=first_step + bad,
                last_good=self.checkpoints.latest(),
                learning_rate=float(found["train/learning_rate"][bad]),
                config=self.config,
            )
        )

    # Validation ----------------------------------------------------------------------

    def _owes_validation(self) -> bool:
        """A run that was interrupted in a validation does it after it is resumed."""
        every, total = self.config.train.eval_every, self.config.train.steps
        due = self.step and (_due(self.step, every) or self.step >= total)
        return bool(due) and int(self.train_state.evaluated) != self.step

    def _scored(self):
        """The parameters that are validated: their average, where the run keeps one."""
        return (
            self.train_state.params
            if self.train_state.ema is None
            else self.train_state.ema
        )

    def _validate(self) -> float | None:
        """Loss of the validation split in nats per token; None if interrupted."""
        self._read()
        with self._phase("validating"):
            loss = self.validation.loss(
                self._scored(), lambda: bool(self.stop.requested()), step=self.step
            )
            if loss is None:
                return None
            before = self.train_state
            noted = self.evaluated(before.plateau, before.averaging, loss, self.step)
            self.train_state = before._replace(**noted)
            unit, score = self.validation.score(loss)
            values = {"eval/nats_per_token": loss, f"eval/{unit}": score}
            self.result.update(values)
            self.writer.write(self.step, values, kind="eval")
            self._say(f"step {self.step}  validation {unit} {score:.4f}")
            was, now = before.averaging, self.train_state.averaging
            if now is not None and bool(now.triggered) > bool(was.triggered):
                self._say(f"step {self.step}  no better: averaging from here on")
        return loss

    # Around it -----------------------------------------------------------------------

    @contextlib.contextmanager
    def _phase(self, name: str):
        """Something other than steps: it has a limit of its own, and is accounted."""
        limit = self.config.hosts.phase_limit
        with (
            self.progress.pause(),
            self.clock.measure(name),
            self.watchdog.allow(limit, name),
        ):
            yield

    def _introduce(self):
        """Says what is trained, on what, and what has changed since the checkpoint."""
        for line in introduction(
            self.config.train,
            self.model,
            self.train_state,
            self.mesh,
            self.prepared,
            segments=self.stream.steps_per_epoch,
        ):
            self._say(line)
        if not self.step:
            return
        self._say(f"resuming from the checkpoint of step {self.step}")
        scale = float(self.train_state.plateau.scale)
        rate = functools.partial(optimizers.next_rate, step=self.step, scale=scale)
        for line in resume.lines(self.sealed, self.config, self.step, rate):
            self._say(line)

    def _conclude(self):
        """The share of the wall clock that went into steps which survived."""
        self.clock.record(self.step)
        if hosts.is_first():
            self.writer.flush()
            found = goodput.summary(goodput.read(self.workdir))
            self.writer.write(self.step, found, kind=goodput.TOTAL)
            self.result["goodput"] = round(found["goodput/ratio"], 4)
            self._say(goodput.line(found))

    def _check_lock(self):
        if self.lock:  # the first host's
            self.lock.check()

    def _profile(self):
        if self.profiler.due(self.step):
            self._read()
            with self._phase("other"):
                self._say(self.profiler.follow(self.step))

    def _say(self, line):
        if line:
            self.writer.console(line)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
