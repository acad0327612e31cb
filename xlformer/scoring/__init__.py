"""What a model makes of a text: rows, results, and the card that says how."""

from xlformer.scoring.evaluator import TOKENS_PER_CALL, Evaluator, Score
from xlformer.scoring.results import Scored, Tally, unigram_entropy
from xlformer.scoring.rows import WARMUPS, Plan, cut_rows, cut_rows_for, reach
from xlformer.scoring.settings import EvalSettings

plan = cut_rows  # its name in 0.1.0; `xlformer.plan` is a command

__all__ = [
    "EvalSettings",
    "Evaluator",
    "Plan",
    "Score",
    "Scored",
    "TOKENS_PER_CALL",
    "Tally",
    "WARMUPS",
    "cut_rows",
    "cut_rows_for",
    "plan",
    "reach",
    "unigram_entropy",
]
