"""The contract of models.base.Model as one test for any model.

    testing.check_model(models.build(config))

Everything is computed in float64, so that a difference is an error and not rounding,
and with weights large enough that what must not be seen would show.
"""

from __future__ import annotations

import jax

from xlformer.models.base import Model
from xlformer.testing import scoring, training
from xlformer.testing.case import Case

__all__ = ["CHECKS", "check_model"]

CHECKS = (*scoring.CHECKS, *training.CHECKS)


def check_model(model: Model, *, key: jax.Array | None = None) -> None:
    """Raises AssertionError, naming the property and the difference, unless all hold:

    - state: init gives float32; init_state, what apply returns and state_axes agree;
      float64 stays float64;
    - step: apply takes one, traced or not, and aux holds scalars;
    - rows: no row depends on another, and their order does not matter;
    - causal: no output depends on a later input, bit for bit (some do if the model says
      `causal` False);
    - resets: a reset row is a fresh row from there, and other rows do not move; what
      it no longer sees may be NaN;
    - padding: lengths_B, one for each row or one number, changes nothing before it;
    - segments: of any sizes, or one token, they equal one pass, as long as none starts
      later than memory_length (not for a memory of under 2 tokens, nor where the model
      says `segments_equal_one_pass` False);
    - replay: as many segments as the model says, long and short ones, bring an empty
      state to what it is after the whole stream (not where that is without limit, or
      of over 12 segments);
    - gradient: none crosses from one segment to the one before;
    - loops: jit or not, lax.scan over segments or Python, layers scanned or unrolled;
    - log_probs: at the targets it is -nll (where the model has them);
    - cache: the state of to_cache, for segments and for single tokens, scores the same;
    - train: a row draws from its own key only, and training differs from scoring, and
      with the keys, exactly where the model says `needs_rngs`;
    - hidden: in training too, resets and padding hide what they say;
    - groups: with the same keys, rows give in a group what they give in the batch, and
      aux is a mean over rows;
    - mesh: split over two devices they give the same, where there are two;
    - float64: nothing is rounded to less on its way, and float32 gives nearly the same.

    With `resets_in_segment` False only a reset before the segment is tried. Dropout is
    on in gradient, train, hidden, groups and mesh. A small model takes up to 10
    CPU-seconds, nearly all of it to compile.

    Args:
      model: small, or this takes long.
      key: for weights and tokens.
    """
    key = jax.random.key(0) if key is None else key
    init = jax.jit(model.init)  # traced once for both
    scoring.check_shapes(model, init.eval_shape(key))
    params = init(key)
    with jax.enable_x64(True):
        case = Case.make(model, params, key)
        for check in CHECKS:
            check(case)
