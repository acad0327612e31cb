"""What a model makes of a text: rows, results, and the card that says how."""

from xlformer.scoring.rows import (
    TOKENS_PER_CALL,
    WARMUPS,
    Evaluator,
    Plan,
    Score,
    plan,
    plan_for,
    reach,
    unigram_entropy,
)

__all__ = [
    "Evaluator",
    "Plan",
    "Score",
    "TOKENS_PER_CALL",
    "WARMUPS",
    "plan",
    "plan_for",
    "reach",
    "unigram_entropy",
]
