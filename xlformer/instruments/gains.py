"""Relative effective context length (Dai et al. 2019, appendix C), from losses alone.

Losses are nats of the same targets, [M, N] of M models: short_MN given c tokens before
each target, long_MN given more. Symbols are those of docs/instruments.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Gain(NamedTuple):
    """What a longer context brings to each model, on the hardest targets.

    Attributes:
      relative_M: of perplexity; RECL is where it falls below a threshold.
      absolute_M: the perplexity itself, as the paper's figure 3 shows it.
      error_M: the standard error of relative_M over the targets.
    """

    relative_M: np.ndarray
    absolute_M: np.ndarray
    error_M: np.ndarray


class Length(NamedTuple):
    """A context length; `more` where the longest one measured did not suffice."""

    context: int
    more: bool

    def __str__(self) -> str:
        return f"{self.context}+" if self.more else str(self.context)


def hardest(baseline_N: np.ndarray, share: float) -> np.ndarray:
    """Indices of the share of targets with the largest baseline, at least one."""
    count = max(1, round(share * len(baseline_N)))
    # Stable, so that equal losses are chosen alike everywhere.
    return np.argsort(-baseline_N, kind="stable")[:count]


def gain(short_MN: np.ndarray, long_MN: np.ndarray, share: float) -> Gain:
    """What each model gains by the longer context on the hardest share of the targets.

    The baseline is the smallest loss of all models under the short context. It decides
    which targets are the hardest, and only what is below it counts.
    """
    baseline_N = np.min(short_MN, axis=0).astype(np.float64)
    chosen_N = hardest(baseline_N, share)
    baseline_N = baseline_N[chosen_N]
    # How far below the baseline each model comes, in nats.
    below_MN = np.maximum(baseline_N - long_MN[:, chosen_N].astype(np.float64), 0)
    relative_M = -np.expm1(-below_MN.mean(1))
    error_M = (1 - relative_M) * below_MN.std(1) / np.sqrt(len(chosen_N))
    return Gain(relative_M, np.exp(baseline_N.mean()) * relative_M, error_M)


def curves(
    losses: Iterable[np.ndarray], shares: Sequence[float]
) -> Mapping[float, list[Gain]]:
    """The gains from each context length to the next.

    Args:
      losses: [M, N] for each context length, ascending; no more than two of them are
        held at a time.
      shares: r, of the hardest targets.
    """
    found: dict[float, list[Gain]] = {share: [] for share in shares}
    items = iter(losses)
    short_MN = next(items)
    # Not itertools.pairwise: beside its two the next one would be made.
    for long_MN in items:
        for share in shares:
            found[share].append(gain(short_MN, long_MN, share))
        short_MN = long_MN
    return found


def recl(contexts: Sequence[int], gains: Sequence[float], threshold: float) -> Length:
    """The first context whose gain by the next one is below the threshold.

    gains: relative ones of one model, one fewer than contexts.
    """
    for context, found in zip(contexts, gains, strict=False):
        if found < threshold:
            return Length(context, False)
    return Length(contexts[-1], True)


def ecl(contexts: Sequence[int], nats: Sequence[float]) -> int:
    """The shortest context whose perplexity is within 1 % of that of the longest.

    The effective context length of one model (Khandelwal et al. 2018), for whom the
    longest context is infinite. nats: the mean loss with each context.
    """
    enough = nats[-1] + np.log1p(0.01)
    return next(c for c, loss in zip(contexts, nats, strict=True) if loss <= enough)
