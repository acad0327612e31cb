"""One model that is taught one task from one set, and asked: the parts of `tasks`."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from xlformer import models, storage
from xlformer.instruments import fitting, records, sequences
from xlformer.instruments.sequences import Task
from xlformer.models import parameters


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is taught and asked.

    Attributes:
      sets: sequences in the sets.
      hardest: the largest difficulty in training, by its unit.
      asked: the difficulties of the test, by their unit.
      steps: of the training, the same for all sets.
      batch_size: rows of a step.
      every: one step in so many has rows with room for the hardest test, in which a
        sequence stands anywhere: a position that was never trained says nothing. They
        have as many tokens as the other steps.
      questions: of each difficulty.
    """

    sets: tuple[int, ...] = (1_000, 10_000, 100_000)
    hardest: tuple = (("digits", 5), ("attractors", 2))
    asked: tuple = (
        ("digits", (5, 6, 7, 8, 10, 20, 50)),
        ("attractors", (0, 1, 2, 3, 4, 5, 10, 20)),
    )
    steps: int = 700
    batch_size: int = 64
    every: int = 4
    questions: int = 128

    def most(self, task: Task) -> int:
        """The largest difficulty in training."""
        return dict(self.hardest)[task.unit]

    def levels(self, task: Task) -> tuple[int, ...]:
        """The difficulties of the test."""
        return dict(self.asked)[task.unit]

    def room(self, task: Task) -> int:
        """Tokens of a row that holds the longest sequence of the training."""
        return task.longest(self.most(task)) - 1

    def longest(self) -> int:
        """Tokens of a row that holds the longest sequence of any test."""
        tasks = sequences.TASKS.values()
        return max(task.longest(max(self.levels(task))) for task in tasks) - 1


@dataclasses.dataclass(frozen=True)
class Lesson:
    """One model, trained on one set of one task."""

    task: str
    member: str
    model: models.Model
    rate: float
    size: int
    seed: int
    settings: Settings

    def found(self, folder: epath.Path) -> dict:
        """What it comes to: from an earlier call, or measured."""
        name = f"{self.task}-{self.member}-{self.size}-{self.seed}"
        file = folder / (re.sub(r"[^\w.-]+", "_", name) + ".json")
        settings = self.facts()
        if kept := records.read(file, settings=settings):
            return kept
        begin = time.perf_counter()
        kept = {"settings": settings, **self._measured()}
        kept["seconds"] = round(time.perf_counter() - begin, 1)
        folder.mkdir(parents=True, exist_ok=True)
        storage.put(file, json.dumps(kept, indent=1) + "\n")
        print(
            f"{self.task}, {self.member}, {self.size:,} sequences, seed {self.seed}: "
            f"loss {kept['loss']:.4f}, {kept['seconds']} s",
            file=sys.stderr,
            flush=True,
        )
        return kept

    def facts(self) -> dict:
        """What its numbers depend on; a kept one with others is not this one."""
        task, settings = sequences.TASKS[self.task], self.settings
        said = {
            "task": self.task,
            "member": self.member,
            "model": repr(self.model),
            "rate": self.rate,
            "set": self.size,
            "seed": self.seed,
            "hardest": settings.most(task),
            "asked": settings.levels(task),
            "longest": settings.longest(),
            **{
                name: getattr(settings, name)
                for name in ("steps", "batch_size", "every", "questions")
            },
        }
        # As it is read back.
        return json.loads(json.dumps(said))

    def _measured(self) -> dict:
        whole = taught(self.task, self.seed, self.settings)
        rng = np.random.default_rng((self.seed, 2))
        params, loss = fitting.fit(
            self.model,
            batches(whole[: self.size], self.task, self.settings, rng),
            rate=self.rate,
            steps=self.settings.steps,
            seed=self.seed,
        )
        by_difficulty = []
        # Of the largest set nothing is asked, so that all sets get the same questions.
        for new in asked(self.task, self.seed, self.settings, seen=whole):
            batch, weights_BT = sequences.rows(new, self.settings.longest())
            right = fitting.accuracies(self.model, params, batch, weights_BT)
            logged = fitting.metrics(self.model, params, batch)
            steps = logged.get("ponder/updates")
            by_difficulty.append(
                {
                    "characters": right[0],
                    "sequences": right[1],
                    "steps": None if steps is None else float(steps),
                }
            )
        return {
            "loss": loss,
            "parameters": parameters.count(params),
            "by_difficulty": by_difficulty,
        }


@functools.lru_cache(maxsize=2)
def taught(name: str, seed: int, settings: Settings) -> list:
    """The largest set of a seed; smaller ones are its beginnings."""
    task, rng = sequences.TASKS[name], np.random.default_rng((seed, 0))
    known = np.arange(task.least, settings.most(task) + 1)
    shares = task.ratio ** np.arange(len(known))
    levels = rng.choice(known, max(settings.sets), p=shares / shares.sum())
    return [task.draw(rng, int(level)) for level in levels]


def asked(name: str, seed: int, settings: Settings, seen: Sequence) -> Iterator[list]:
    """What is asked at each difficulty; nothing that was seen, where there is more."""
    task, rng = sequences.TASKS[name], np.random.default_rng((seed, 1))
    known = {tuple(question) for question, _ in seen}
    for level in settings.levels(task):
        rows = []
        for _ in range(settings.questions):
            tries = (task.draw(rng, level) for _ in range(100))
            new = (pair for pair in tries if tuple(pair[0]) not in known)
            rows.append(next(new, None) or task.draw(rng, level))
        yield rows


def batches(pairs: Sequence, name: str, settings: Settings, rng) -> Iterator:
    """Rows of one sequence each, in epochs over the set, for ever."""
    short, long = settings.room(sequences.TASKS[name]), settings.longest()
    few = max(1, settings.batch_size * short // long)
    order = _epochs(len(pairs), rng)
    step = 0
    while True:
        step += 1
        anywhere = step % settings.every == 0
        count, room = (few, long) if anywhere else (settings.batch_size, short)
        chosen = [pairs[next(order)] for _ in range(count)]
        starts = [
            int(rng.integers(room + 2 - len(q) - len(a))) if anywhere else 0
            for q, a in chosen
        ]
        yield sequences.rows(chosen, room, starts)


def _epochs(size: int, rng) -> Iterator[int]:
    while True:
        yield from rng.permutation(size)
