"""Questions with answers, as sequences of symbols: what a model is taught and asked.

copy, reverse and addition are those of Dehghani et al. 2018 (arXiv:1807.03819, table
4), digits of numbers with the least significant first. agreement is theirs after Linzen
et al. 2016, which number a verb has, with a grammar in place of a corpus:

    sentence = [front] 'the' noun modifier* '=' number
    front    = preposition 'the' noun ','
    modifier = preposition 'the' noun | 'that' 'the' noun verb

A modifier whose noun has not the subject's number is an attractor. There are others
among them, and a front has any number: the answer is neither that of the first noun,
nor of the last one, nor the more frequent one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from xlformer.errors import UserError, did_you_mean

BASE = 10  # The first symbols are digits.
MARKS = ("=", "+", "end", "nothing", "the", "that", ",", "singular", "plural")
EQUALS, PLUS, END, NOTHING, THE, THAT, COMMA, SINGULAR, PLURAL = range(
    BASE, BASE + len(MARKS)
)
# How many words there are; nouns and verbs have two forms, the plural's follow.
PREPOSITIONS, NOUNS, VERBS = 3, 8, 4
PREPOSITION = BASE + len(MARKS)
NOUN = PREPOSITION + PREPOSITIONS
VERB = NOUN + 2 * NOUNS
SYMBOLS = VERB + 2 * VERBS
MOST_LIKE_SUBJECT = 2  # modifiers that are no attractors


def copy(rng, n: int):
    """n digits, to be said again: (question, answer)."""
    digits = rng.integers(0, BASE, n).tolist()
    return [*digits, EQUALS], [*digits, END]


def reverse(rng, n: int):
    """n digits, to be said backwards."""
    digits = rng.integers(0, BASE, n).tolist()
    return [*digits, EQUALS], [*digits[::-1], END]


def addition(rng, n: int):
    """Two numbers of n digits; their sum has one more, which may be 0."""
    first, second = rng.integers(0, BASE, (2, n)).tolist()
    answer, carry = [], 0
    for a, b in zip(first, second, strict=True):
        carry, digit = divmod(a + b + carry, BASE)
        answer.append(digit)
    return [*first, PLUS, *second, EQUALS], [*answer, carry, END]


def agreement(rng, attractors: int):
    """A sentence up to its verb, and the number of that."""
    plural = int(rng.integers(2))
    others = rng.integers(0, MOST_LIKE_SUBJECT + 1)
    numbers = np.array([1 - plural] * attractors + [plural] * others, int)
    front = [*_phrase(rng, rng.integers(2)), COMMA] if rng.integers(2) else []
    words = [*front, THE, _noun(rng, plural)]
    for number in rng.permutation(numbers):
        words += _phrase(rng, number) if rng.integers(2) else _clause(rng, number)
    return [*words, EQUALS], [PLURAL if plural else SINGULAR]


def _noun(rng, plural) -> int:
    return int(NOUN + NOUNS * plural + rng.integers(NOUNS))


def _phrase(rng, plural) -> list[int]:
    return [int(PREPOSITION + rng.integers(PREPOSITIONS)), THE, _noun(rng, plural)]


def _clause(rng, plural) -> list[int]:
    verb = int(VERB + VERBS * plural + rng.integers(VERBS))
    return [THAT, THE, _noun(rng, plural), verb]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked, and how hard it is made.

    Attributes:
      draw: (rng, difficulty) -> a question and its answer, lists of symbols.
      unit: what the difficulty counts.
      least: the smallest one.
      ratio: how frequent each one is in training, beside the one before it.
      longest: the most symbols of question and answer together, by difficulty.
    """

    draw: Callable
    unit: str
    least: int
    ratio: float
    longest: Callable[[int], int]


TASKS = {
    "copy": Task(copy, "digits", 1, 1.0, lambda n: 2 * n + 2),
    "reverse": Task(reverse, "digits", 1, 1.0, lambda n: 2 * n + 2),
    "addition": Task(addition, "digits", 1, 1.0, lambda n: 3 * n + 4),
    "agreement": Task(
        # Most sentences of a language have none, which is how the others are learnt.
        agreement,
        "attractors",
        0,
        0.3,
        lambda n: 4 * (n + MOST_LIKE_SUBJECT) + 8,
    ),
}


def find(name: str) -> Task:
    """The task of a name."""
    if name not in TASKS:
        raise UserError(f"no task {name!r}{did_you_mean(name, TASKS)}")
    return TASKS[name]


Pair = tuple[list[int], list[int]]


def rows(pairs: Sequence[Pair], room: int, starts: Sequence[int] | None = None):
    """A row for each question and answer, and nothing around them.

    There is no reset where a sequence begins: positions would count from there, and a
    large one would never be trained.

    Args:
      pairs: questions and answers.
      room: of a row, in tokens.
      starts: where in its row each one begins; by default all at 0.

    Returns:
      What Model.apply takes, and the weights of the targets: 1 in the answer.
    """
    tokens_BN = np.full((len(pairs), room + 1), NOTHING, np.int32)
    weights_BT = np.zeros((len(pairs), room), np.float32)
    ends_B = np.zeros(len(pairs), np.int32)
    starts = [0] * len(pairs) if starts is None else starts
    for row, ((question, answer), start) in enumerate(zip(pairs, starts, strict=True)):
        end = start + len(question) + len(answer)
        tokens_BN[row, start:end] = [*question, *answer]
        # The target of input t is token t + 1.
        weights_BT[row, start + len(question) - 1 : end - 1] = 1
        ends_B[row] = end - 1
    return {
        "inputs_BT": tokens_BN[:, :-1],
        "targets_BT": tokens_BN[:, 1:],
        "lengths_B": ends_B,
    }, weights_BT
