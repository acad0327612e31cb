"""Trains a model: python -m xlformer.train --config=NAME --workdir=DIR.

The story, from top to bottom: config -> data -> model -> state -> loop -> checkpoint.
A second call with the same directory resumes, and does bit by bit what an uninterrupted
run would have done.
"""

from __future__ import annotations

import json
import os
import sys
import time

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from xlformer import command, models, prepare, runs, scoring
from xlformer import config as config_lib
from xlformer.data.stream import Stream
from xlformer.errors import UserError
from xlformer.training import faults, metrics, optimizers, state, steps
from xlformer.training.checkpoints import Checkpoints

# What a run that was killed in its first seconds can have left behind.
OWN_FILES = ("lock", "metrics.jsonl", "tensorboard", runs.CHECKPOINTS, runs.VOCABULARY)


def train(config: ConfigDict, workdir, model: models.Model | None = None) -> dict:
    """Trains, or resumes, until config.train.steps.

    Args:
      config: of `xlformer.config.load`, or default_config with your changes.
      workdir: config.json, vocabulary.json, checkpoints, metrics; made if missing.
      model: your own, in place of models.build(config.model).

    Returns:
      The last metrics: 'step', 'train/loss_nats', 'eval/nats_per_token' (of the last
      validation), 'interrupted' (a signal's name or None).

    Raises:
      UserError: bad input, or a loss that is not finite.
    """
    workdir = epath.Path(workdir)
    with faults.Interrupt() as interrupt:
        steps.check(config)
        prepared = prepare.prepare(config.data)
        size = prepared.vocabulary.size
        model = model or models.build(config.model, vocab_size=size)
        if model.vocab_size < size:
            raise UserError(
                f"the model knows {model.vocab_size} ids, the data has {size}"
            )
        run = _Training(config, workdir, model, prepared, interrupt)
        _refuse_foreign(workdir)
        with faults.WorkdirLock(workdir), metrics.Writer(workdir) as writer:
            return run.start(writer)


class _Training:
    """One process's part of a run. Whatever must survive it is in self.state."""

    def __init__(self, config, workdir, model, prepared, interrupt):
        train = config.train
        self.config, self.workdir, self.model = config, workdir, model
        self.prepared, self.interrupt = prepared, interrupt
        self.optimizer = optimizers.build(config.optimizer)
        self.schedule = optimizers.learning_rate(config.optimizer, train.steps)
        self.stream = Stream(
            prepared.tokens["train"],
            batch_size=train.batch_size,
            segment_length=train.segment_length,
            extended_length=model.extended_length,
            documents=prepared.documents["train"],
            variable_length=train.variable_length,
            seed=config.seed,
        )
        self.step_fn = steps.make_step(config, model, self.optimizer, self.schedule)
        self.validation = _Validation(config, model, prepared)
        self.plateau = jax.jit(
            lambda plateau, loss: optimizers.plateau_update(
                plateau,
                loss,
                factor=config.optimizer.plateau_factor,
                patience=config.optimizer.plateau_patience,
            )
        )
        self.profiling = False
        self.calls = {}  # compiled steps by how many segments one call takes
        self.pending = None  # (step, metrics) of the last call, not yet read
        self.seen = []  # its loss for each call since the last line
        self.clock = _Clock()
        self.result = {}

    def start(self, writer) -> dict:
        self.writer = writer
        with Checkpoints(
            self.workdir / runs.CHECKPOINTS, keep=self.config.train.keep
        ) as self.checkpoints:
            self.state, self.step = self._state()
            self._write_config()
            self.result = {"step": self.step, "interrupted": None}
            total = self.config.train.steps
            if self.step >= total and not self._owes_validation():
                self._say(f"the run is complete: {self.step} of {total} steps")
                return self.result
            self._introduce()
            self.validation.compile(self.state.params)
            self._compiled(self._next_count() or 1)
            self._loop()
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
        step, found, _ = self.checkpoints.restore(jax.eval_shape(create, key))
        if step:
            self._check_place(step, found.data)
        self._say(f"resuming from the checkpoint of step {step}")
        return found, step

    def _check_place(self, step, place):
        found = tuple(int(x) for x in place)
        expected = tuple(self.stream.place(step - 1))
        if found != expected:
            raise UserError(
                f"{self.workdir}: step {step} ended at (epoch, offset, length) {found} "
                f"but the data and config.train give {expected}: another text or "
                "config.train.segment_length"
            )

    def _write_config(self):
        if not (self.workdir / runs.VOCABULARY).exists():
            text = self.prepared.vocabulary.to_json()
            _write(self.workdir / runs.VOCABULARY, text)
        _write(self.workdir / runs.CONFIG, config_lib.to_json(self.config))

    def _save(self, metric=None):
        with self.clock.pause():
            self.checkpoints.save(
                self.step, self.state, config=self.config.to_dict(), metric=metric
            )

    # The loop ------------------------------------------------------------------------

    def _loop(self):
        train = self.config.train
        self.clock.restart()
        if self._owes_validation():
            self._save(self._validate())
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
        self._stop_profile()

    def _next_count(self) -> int:
        """Segments of the next call: never across a validation, a save or the end."""
        train = self.config.train
        count = min(train.segments_per_call, train.steps - self.step)
        for every in (train.eval_every, train.save_every):
            if every:
                count = min(count, every - self.step % every)
        return count

    def _batch(self, count):
        batches = [self.stream.at(s) for s in range(self.step, self.step + count)]
        if count == 1:
            return batches[0]
        return {name: np.stack([b[name] for b in batches]) for name in batches[0]}

    def _compiled(self, count):
        if count not in self.calls:
            function = self.step_fn if count == 1 else steps.make_steps(self.step_fn)
            with self.clock.pause():
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
        losses, train = found["train/loss_nats"], self.config.train
        in_a_row = int(found["train/skipped_in_a_row"][-1])
        lost = in_a_row if not train.skip_nonfinite else faults.too_many_skips(in_a_row)
        if lost:
            raise UserError(
                faults.nonfinite_message(
                    step=step - len(losses) + int(np.argmin(found["train/finite"])) + 1,
                    last_good=self.checkpoints.latest(),
                    learning_rate=float(found["train/learning_rate"][-1]),
                    config=self.config,
                )
            )
        self.seen.extend(losses[found["train/finite"]].tolist())
        self.clock.tokens += len(losses) * train.batch_size * train.segment_length
        self.result.update(step=step, **{"train/loss_nats": float(losses[-1])})
        if self.seen and (_due(step, train.log_every) or step >= train.steps):
            self._log(step, {name: float(x[-1]) for name, x in found.items()})

    def _log(self, step, found):
        loss = float(np.mean(self.seen))
        rate = self.clock.tokens_per_s()
        per_step = self.config.train.batch_size * self.config.train.segment_length
        unit, score = self.validation.score(loss)
        found |= {"train/loss_nats": loss, f"train/{unit}": score}
        found |= {"perf/tokens_per_s": rate}
        self.writer.write(step, found)
        line = metrics.format_progress(
            step=step,
            total=self.config.train.steps,
            loss_nats=loss,
            score=score,
            unit=unit,
            tokens_per_s=rate,
            eta_s=(self.config.train.steps - step) * per_step / rate,
        )
        self._say(line)
        self.seen = []
        self.clock.restart()

    def _owes_validation(self) -> bool:
        """A run that was interrupted in a validation does it after it is resumed."""
        every, total = self.config.train.eval_every, self.config.train.steps
        due = self.step and (_due(self.step, every) or self.step >= total)
        return bool(due) and int(self.state.evaluated) != self.step

    def _validate(self) -> float | None:
        """Loss of the validation split in nats per token; None if interrupted."""
        self._read()
        with self.clock.pause():
            # With an average of the parameters, that is what is meant to be used.
            params = self.state.params if self.state.ema is None else self.state.ema
            loss = self.validation.loss(params, self.interrupt)
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
        train = self.config.train
        if train.profile_steps and self.step == train.profile_start:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.profiling = True
        elif self.step >= train.profile_start + train.profile_steps:
            self._stop_profile()

    def _stop_profile(self):
        if self.profiling:
            self._read()
            jax.profiler.stop_trace()
            self.profiling = False
            self._say(f"profile: {self.workdir / 'profile'}")

    def _say(self, line):
        self.writer.console(line)


class _Validation:
    """Scores the validation split with the settings of config.eval."""

    def __init__(self, config, model, prepared):
        settings = config.eval
        visible = {
            "memory_length": settings.memory_length,
            "clamp_length": settings.clamp_length,
            "same_length": settings.same_length or None,
        }
        if settings.split not in prepared.tokens:
            known = ", ".join(prepared.tokens)
            raise UserError(f"config.eval.split={settings.split!r} is none of {known}")
        self.tokens = prepared.tokens[settings.split]
        if settings.max_tokens:
            self.tokens = self.tokens[: settings.max_tokens]
        self.documents = prepared.documents[settings.split]
        self.in_words = prepared.vocabulary.unit in ("words", "pieces")
        model = runs.for_reading(model, visible)
        self.plan = scoring.plan(
            len(self.tokens),
            batch_size=settings.batch_size,
            segment_length=settings.segment_length,
            memory_length=scoring.reach(model),
            n_layer=model.config.n_layer,
        )
        self.evaluator = scoring.Evaluator(
            model,
            batch_size=len(self.plan.start_B),
            segment_length=self.plan.segment_length,
        )

    def compile(self, params):
        self.evaluator.compile(params)

    def loss(self, params, interrupt) -> float | None:
        score = self.evaluator.score(
            params,
            self.tokens,
            self.plan,
            documents=self.documents,
            progress=lambda _: bool(interrupt.requested),
        )
        return None if score is None else score.nats / score.targets

    def score(self, nats: float) -> tuple[str, float]:
        """Perplexity of words and pieces, bits of characters and bytes."""
        if self.in_words:
            return "ppl", float(np.exp(min(nats, 700)))
        return "bpc", nats / np.log(2)


class _Clock:
    """Tokens per second of training alone."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.tokens, self._start = 0, time.perf_counter()

    def tokens_per_s(self) -> float:
        return max(self.tokens, 1) / max(time.perf_counter() - self._start, 1e-9)

    def pause(self):
        return _Pause(self)

    def forget(self, seconds: float):
        self._start += seconds


class _Pause:
    """Time inside of it does not count."""

    def __init__(self, clock):
        self._clock = clock

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *error):
        self._clock.forget(time.perf_counter() - self._start)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _refuse_foreign(workdir):
    if not workdir.exists() or (workdir / runs.CONFIG).exists():
        return
    strange = sorted(p.name for p in workdir.iterdir() if p.name not in OWN_FILES)
    if strange:
        raise UserError(
            f"--workdir={workdir} is no run and not empty (it has {strange[0]!r}); "
            "name a new or an empty directory"
        )


def _write(path, text: str):
    """Whole or not at all, where files can be renamed."""
    try:
        if "://" in str(path):
            path.write_text(text)
            return
        temporary = path.parent / f"{path.name}.tmp"
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.train", description=__doc__)
    parser.add_argument("--config", required=True, help="NAME[:args] or FILE.py[:args]")
    parser.add_argument("--workdir", required=True)
    args, overrides = parser.parse_with_overrides(argv)
    result = train(config_lib.load(args.config, overrides), args.workdir)
    print(json.dumps(result))
    return faults.INTERRUPTED if result["interrupted"] else 0


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
