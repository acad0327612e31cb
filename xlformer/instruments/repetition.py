"""How much a text repeats itself: pure functions of its words, or of any items.

An n-gram is n items that follow each other; a text of N items has N - n + 1 of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

TIMES = 3  # What is said so often in a row is a loop.


def ngrams(items: Sequence[Hashable], n: int) -> list[tuple]:
    """All n-grams in order."""
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def distinct(items: Sequence[Hashable], n: int) -> float | None:
    """Distinct n-grams as a share of all n-grams.

    Li et al. 2016 (arXiv:1510.03055) divide by the words, n - 1 more. The rest is the
    share of n-grams that stand earlier in the text, too. It falls with the length: only
    texts of equal length compare. None where there is no n-gram.
    """
    found = ngrams(items, n)
    return len(set(found)) / len(found) if found else None


def shared(items: Sequence[Hashable], source: Sequence[Hashable], n: int):
    """The share of n-grams that another text has, too; None where there is none."""
    found, known = ngrams(items, n), set(ngrams(source, n))
    return sum(x in known for x in found) / len(found) if found else None


def longest_repeat(items: Sequence[Hashable]) -> int:
    """Items of the longest span that stands at two places, which may overlap."""
    # What repeats in full repeats in every part, so that lengths can be halved.
    least, most = 0, max(len(items) - 1, 0)
    while least < most:
        middle = (least + most + 1) // 2
        found = ngrams(items, middle)
        if len(set(found)) < len(found):
            least = middle
        else:
            most = middle - 1
    return least


def looped(items: Sequence[Hashable], times: int = TIMES) -> float | None:
    """The share of items in spans that say the same `times` times in a row, or more."""
    N = len(items)
    names = {item: i for i, item in enumerate(dict.fromkeys(items))}
    ids_N = np.array([names[item] for item in items])
    inside_N = np.zeros(N, bool)
    for period in range(1, N // times + 1):
        # So many equalities in a row at this distance are one more period of text.
        same = ids_N[period:] == ids_N[:-period]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], same, [0]])))
        for start, end in edges.reshape(-1, 2):
            if end - start >= (times - 1) * period:
                inside_N[start : end + period] = True
    return float(inside_N.mean()) if N else None
