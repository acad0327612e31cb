"""The nats of many texts, each read alone and from its beginning, side by side in rows.

A text is read as `evaluate` reads it with one row: in segments of the same length, the
memory carried from one to the next. So its score is that of evaluate, whatever stands
in the other rows. Texts that are shorter than a segment are read in one that is not
much longer than they are, which changes no number: nothing comes before or behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from xlformer.errors import Argument, UserError
from xlformer.harness.texts import Text
from xlformer.scoring import Evaluator, Plan, Scored, Tally

# The shortest segment: there is a compiled program for each power of two from here on.
LEAST = 16
# Numbers of one call's log-probabilities, of the whole vocabulary at each place: 512 MB
# as float32. With long segments and a vocabulary of 267,735 words it is few rows.
NUMBERS = 1 << 27


class Likelihood(NamedTuple):
    """Of scored tokens: their summed nll, and whether each was the most probable."""

    nats: float
    greedy: bool


class Likelihoods:
    """A model's likelihoods of texts, with compiled programs that all texts share.

    Args:
      model: as it reads, see EvalSettings.model.
      params: of the model, on the mesh.
      segment_length: targets of a segment.
      batch_size: rows that are read side by side, at most.
      step: of the checkpoint.
      mesh: shares the rows.
    """

    def __init__(
        self,
        model,
        params,
        *,
        segment_length: int,
        batch_size: int,
        step: int = 0,
        mesh: jax.sharding.Mesh | None = None,
    ):
        if batch_size < 1:
            raise UserError(Argument("batch_size", batch_size), " must be at least 1")
        self._model, self._params, self._step = model, params, step
        self._segment_length, self._rows = segment_length, batch_size
        self._mesh, self._evaluators = mesh, {}

    def of(
        self,
        texts: Sequence[Text],
        *,
        greedy: bool = False,
        progress: Callable[[float], object] | None = None,
    ) -> list[Likelihood]:
        """The likelihood of each text, in their order.

        Args:
          texts: at least one token stands before the first that is scored.
          greedy: whether to look which tokens are the most probable ones; else none is.
          progress: called with the fraction done.
        """
        # Where no token is scored there is none that is not the most probable.
        found = [Likelihood(0.0, greedy)] * len(texts)
        asked = [i for i, text in enumerate(texts) if len(text.ids_N) > text.first]
        done, total = 0, sum(len(texts[i].ids_N) for i in asked)
        for T, rows, numbers in self._batches(texts, asked, greedy):
            part = [texts[i] for i in numbers]
            evaluator = self._evaluator(T, rows, greedy)
            for i, one in zip(numbers, self._score(evaluator, T, part), strict=True):
                found[i] = one
            done += sum(len(text.ids_N) for text in part)
            if progress is not None:
                progress(done / total)
        return found

    def _batches(self, texts, asked, greedy) -> Iterator[tuple[int, int, list[int]]]:
        """Yields segment lengths, rows, and which texts are read in them together."""
        by_segment: dict[int, list[int]] = {}
        # The longest first: rows end together, and what takes most memory comes first.
        for i in sorted(asked, key=lambda i: -len(texts[i].ids_N)):
            T = _fitting(len(texts[i].ids_N) - 1, self._segment_length)
            by_segment.setdefault(T, []).append(i)
        for T, numbers in by_segment.items():
            # Of a few texts no more rows than twice as many are read.
            rows = 1 << (len(numbers) - 1).bit_length()
            rows = min(rows, self._fitting_rows(T, greedy))
            for start in range(0, len(numbers), rows):
                yield T, rows, numbers[start : start + rows]

    def _fitting_rows(self, T: int, greedy: bool) -> int:
        if not greedy:
            return self._rows
        of_a_row = (T + self._model.extended_length) * self._model.vocab_size
        return max(1, min(self._rows, NUMBERS // of_a_row))

    def _evaluator(self, T: int, rows: int, greedy: bool) -> Evaluator:
        key = T, rows, greedy
        if key not in self._evaluators:
            self._evaluators[key] = Evaluator(
                self._model,
                batch_size=rows,
                segment_length=T,
                steps=1,
                mesh=self._mesh,
                greedy=greedy,
            )
        return self._evaluators[key]

    def _score(self, evaluator, T: int, texts: list[Text]) -> Iterator[Likelihood]:
        size_B = np.array([len(text.ids_N) for text in texts])
        first_B = np.array([text.first for text in texts])
        # One behind the other, as the rows of a plan are cut from one stream.
        start_B = np.cumsum(size_B) - size_B
        steps = int(-(-(size_B.max() - 1) // T))
        # A target is named by its input, the token before it.
        plan = Plan(
            T, steps, start_B, start_B + first_B - 1, start_B + size_B - 1, "none"
        )
        tally = _ByText(start_B)
        tokens = np.concatenate([text.ids_N for text in texts])
        evaluator.score(self._params, tokens, plan, step=self._step, tally=tally)
        if not np.isfinite(tally.nats_B).all():
            raise UserError(
                "the model gives no probabilities but NaN: its weights, or what they "
                "make of a text, are not finite; try another ",
                Argument("checkpoint"),
            )
        yield from map(Likelihood, tally.nats_B.tolist(), tally.greedy_B.tolist())


class _ByText(Tally):
    """Sums that are kept apart by where in the stream texts begin."""

    def __init__(self, start_B: np.ndarray):
        super().__init__()
        self._start_B = start_B
        self.nats_B = np.zeros(len(start_B))
        self.greedy_B = np.ones(len(start_B), bool)

    def add(self, scored: Scored) -> None:
        super().add(scored)
        row_N = np.searchsorted(self._start_B, scored.index_N, side="right") - 1
        np.add.at(self.nats_B, row_N, scored.nll_N)
        said_N = False if scored.greedy_N is None else scored.greedy_N
        np.logical_and.at(self.greedy_B, row_N, said_N)


def _fitting(targets: int, segment_length: int) -> int:
    """The length of the segments in which so many targets are read."""
    if targets > segment_length:
        return segment_length
    return min(segment_length, max(LEAST, 1 << (targets - 1).bit_length()))
