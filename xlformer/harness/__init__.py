"""A run as a model of lm-evaluation-harness; `python -m xlformer.harness` starts it.

`Answerer` does what is asked and knows nothing of that program; model.py alone imports
it.
"""

from xlformer.harness.answerer import Answerer

__all__ = ["Answerer"]
