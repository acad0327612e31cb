"""The numbers of a card: what is made of the nll of each scored token.

This is the only place that knows the formulas. A new number is one more line of
`Tally.results`; where it needs the tokens one by one, `Tally.add` sees each of them
once, in blocks. A text may have more tokens than there is room for (103 million in
WikiText-103): a Tally keeps sums.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from xlformer.scoring.rows import Plan

BLOCK = 1 << 20  # tokens that are counted at a time


class Scored(NamedTuple):
    """Targets that were scored together: the segments of all rows, one after another.

    Attributes:
      index_N: where each target stands in the text.
      ids_N: its token.
      nll_N: its negative log-likelihood in nats, float64.
      greedy_N: whether nothing is more probable; None where that was not asked.
    """

    index_N: np.ndarray
    ids_N: np.ndarray
    nll_N: np.ndarray
    greedy_N: np.ndarray | None = None


class Tally:
    """What a card says of its targets, collected block by block.

    Attributes:
      nats: the summed nll.
      targets: how many were scored.
    """

    def __init__(self):
        self.nats, self.targets = 0.0, 0

    def add(self, scored: Scored) -> None:
        """Takes in a block; every target comes once, in no promised order."""
        self.nats += float(scored.nll_N.sum())
        self.targets += len(scored.nll_N)

    def results(self, size: int | None, words: int | None) -> dict:
        """The fields of the card.

        size, words: the bytes and words that the targets stand for (units.py); None
        where that is unknown, as are the results that are too large for a number.
        """
        per_token = self.nats / self.targets
        return {
            "tokens_scored": self.targets,
            "bytes_scored": size,
            "words_scored": words,
            "nats": self.nats,
            "nats_per_token": per_token,
            "bpc": bits(per_token),
            "ppl": perplexity(per_token),
            "bits_per_byte": bits(self.nats / size) if size else None,
            "word_ppl": perplexity(self.nats / words) if words else None,
        }


class ByPlace(Tally):
    """The same by the place in the segment; place 0 sees the memory and itself.

    Attributes:
      plan: how the text is read.
      nats_T, targets_T: nats and targets of each place.
    """

    def __init__(self, plan: Plan, causal: bool = True):
        super().__init__()
        self.plan, self._ahead = plan, int(causal)
        self.nats_T = np.zeros(plan.segment_length)
        self.targets_T = np.zeros(plan.segment_length, np.int64)

    def add(self, scored: Scored) -> None:
        super().add(scored)
        plan, T = self.plan, self.plan.segment_length
        # The input that the target follows; a masked model's is the target itself.
        index_N = scored.index_N - self._ahead
        row_N = np.searchsorted(plan.first_B, index_N, side="right") - 1
        place_N = (index_N - plan.start_B[row_N]) % T
        self.nats_T += np.bincount(place_N, scored.nll_N, minlength=T)
        self.targets_T += np.bincount(place_N, minlength=T)

    @property
    def mean(self) -> float:
        return self.nats / self.targets

    @property
    def mean_T(self) -> list[float]:
        return (self.nats_T / np.maximum(self.targets_T, 1)).tolist()

    def between(self, first: int, stop: int) -> float:
        """The mean of places first to stop, stop not among them."""
        targets = self.targets_T[first:stop].sum()
        return float(self.nats_T[first:stop].sum() / targets) if targets else math.nan


def bits(nats: float) -> float:
    """Nats as bits; those of one symbol are bits per character."""
    return nats / math.log(2)


def perplexity(nats: float) -> float | None:
    """exp(nats), of a token or a word; None where a float64 cannot hold it.

    Of the mean, as the PyTorch original has it: the TPU code of the TensorFlow original
    averages exp(loss) over batches, which is never less.
    """
    # math.exp raises OverflowError from 709.8 on. NaN is not more than 700, and stays.
    return math.exp(nats) if not nats > 700 else None


def headline(nats_per_token: float, unit: str) -> tuple[str, float]:
    """The number that people compare: ('ppl' or 'bpc', its value).

    unit: of the vocabulary; perplexity of words and pieces, bits of bytes and
    characters. What is too large for a number is infinite.
    """
    if unit in ("words", "pieces"):
        found = perplexity(nats_per_token)
        return "ppl", math.inf if found is None else found
    return "bpc", bits(nats_per_token)


def unigram_entropy(tokens: np.ndarray, vocab_size: int) -> float:
    """Entropy in nats of the tokens' own frequencies: what no model may exceed."""
    counts = np.zeros(vocab_size, np.int64)
    # In blocks: bincount makes int64 of all it is given, eight bytes a token.
    for start in range(0, len(tokens), BLOCK):
        counts += np.bincount(tokens[start : start + BLOCK], minlength=vocab_size)
    p = counts[counts > 0] / len(tokens)
    return float(-(p * np.log(p)).sum())


def warning(card: dict, entropy: float) -> str | None:
    """What is wrong with a loss; entropy: of the text's own frequencies."""
    # Who knows nothing but how frequent each token is reaches the entropy. A model that
    # is worse has the ids in another order, or has learned nothing.
    loss = card["nats_per_token"]
    if not math.isfinite(loss):
        return (
            f"the loss is {loss}: the parameters are not finite, or the model "
            f"overflows in {card['dtype']}"
        )
    if loss > entropy:
        return (
            f"the loss {loss:.4f} exceeds the unigram entropy {entropy:.4f} of this "
            "text: wrong vocabulary order, or an untrained model"
        )
    return None
