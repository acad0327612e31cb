"""Texts that a task has continued: how it says so, and rows side by side."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xlformer.errors import UserError, about, did_you_mean
from xlformer.generation.continuation import MOST, Continuation
from xlformer.generation.printing import Row
from xlformer.generation.sampling import Sampling

# By what name tasks say how many tokens; the first that is there counts.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# What tasks say that changes nothing, by the value with which it does not.
WITHOUT_EFFECT = {"num_beams": 1, "repetition_penalty": 1, "num_return_sequences": 1}
OF_SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
KNOWN = ("until", "do_sample", *OF_SAMPLING, *LENGTHS, *WITHOUT_EFFECT)
GREEDY = Sampling(temperature=0)


class Wanted(NamedTuple):
    """How a text shall go on: until when, and how tokens are drawn."""

    stops: tuple[str, ...]
    tokens: int
    sampling: Sampling

    @classmethod
    def of(cls, given: Mapping[str, Any], most: int, where: str) -> Wanted:
        """Reads what a task says; UserError for what would have no effect here.

        most: tokens where it says nothing of their number.
        """
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if name not in KNOWN:
                line = f"{where}: generation has no {name}={value!r:.40}"
                raise UserError(f"{line}{did_you_mean(name, KNOWN)}")
            if WITHOUT_EFFECT.get(name, value) != value:
                line = f"{where}: {name}={value!r:.40} is not possible here, only "
                raise UserError(f"{line}{WITHOUT_EFFECT[name]}")
        stops = given.get("until", ())
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(isinstance(stop, str) for stop in stops):
            raise UserError(f"{where}: until={given['until']!r:.60} is not texts")
        tokens = next((given[name] for name in LENGTHS if name in given), most)
        if not isinstance(tokens, int) or not 1 <= tokens <= MOST:
            line = f"{where}: max_gen_toks={tokens!r:.40} must be a number from 1 to"
            raise UserError(f"{line} {MOST}")
        # As the program does: no text ends before it begins.
        stops = tuple(filter(None, stops))
        return cls(stops, tokens, _sampling(given, where))


def _sampling(given: Mapping[str, Any], where: str) -> Sampling:
    """Greedy, unless do_sample or a temperature says otherwise."""
    rules = {name: given[name] for name in OF_SAMPLING if name in given}
    for name, value in rules.items():
        if not isinstance(value, numbers.Real):
            raise UserError(f"{where}: {name}={value!r:.40} is not a number")
    if not given.get("do_sample", rules.get("temperature", 0) > 0):
        return GREEDY
    rules = {name: float(value) for name, value in rules.items()}
    if "top_k" in rules:
        rules["top_k"] = int(rules["top_k"])
    with about(where):
        return Sampling(**rules)


def continued(
    start: Callable[..., Continuation],
    vocabulary,
    prompts: Sequence[np.ndarray],
    wanted: Sequence[Wanted],
    *,
    rows: int,
    seed: int = 0,
    progress: Callable[[float], object] | None = None,
) -> list[str]:
    """What follows each prompt, as text, without the text that ended it.

    Args:
      start: makes a Continuation of so many rows, with `seed` and `sampling`.
      vocabulary: of the tokens.
      prompts: token ids, at least one each.
      wanted: of each prompt.
      rows: to continue side by side, at most. What is drawn follows a prompt's number
        alone, so those that are not greedy come one by one.
      seed: same seed, same prompts, same texts.
      progress: called with the fraction done.
    """
    found, done = [""] * len(prompts), 0
    rows = min(rows, len(prompts))
    for batch in _batches(prompts, wanted, rows):
        sampling = wanted[batch[0]].sampling
        if sampling != GREEDY:
            text = start(1, seed=_own_seed(seed, batch[0]), sampling=sampling)
            texts = _continue(text, vocabulary, batch, prompts, wanted)
        else:
            text = start(rows, seed=seed, sampling=sampling)
            filled = [*batch, *[batch[-1]] * (rows - len(batch))]
            texts = _continue(text, vocabulary, filled, prompts, wanted)
        for number, one in zip(batch, texts, strict=False):
            found[number] = one
        done += len(batch)
        if progress is not None:
            progress(done / len(prompts))
    return found


def _batches(prompts, wanted, rows: int) -> list[list[int]]:
    """Which prompts go side by side: greedy ones of like length."""
    greedy = [i for i, one in enumerate(wanted) if one.sampling == GREEDY]
    greedy.sort(key=lambda i: (-wanted[i].tokens, -len(prompts[i])))
    drawn = [i for i, one in enumerate(wanted) if one.sampling != GREEDY]
    batches = [greedy[i : i + rows] for i in range(0, len(greedy), rows)]
    return batches + [[i] for i in drawn]


def _own_seed(seed: int, number: int) -> int:
    """32 bits that have nothing to do with those of another number."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _continue(text: Continuation, vocabulary, batch, prompts, wanted) -> list[str]:
    rows = [Row(vocabulary, prompts[i], wanted[i].stops) for i in batch]
    limits = [wanted[i].tokens for i in batch]

    def take(tokens_RN) -> bool:
        for row, limit, ids in zip(rows, limits, tokens_RN, strict=True):
            row.add(ids[: limit - row.tokens])
        ends = zip(rows, limits, strict=True)
        return all(row.stopped or row.tokens >= limit for row, limit in ends)

    text.read([prompts[i] for i in batch])
    text.draw(max(limits), on_tokens=take)
    for row in rows:
        row.finish()
    return [row.text for row in rows]
