"""What a model is trained to say: of each segment, what it reads and what counts.

An objective turns a segment into inputs, targets and weights of the losses. A new one
is a class in OBJECTIVES here, and a line of fields.OBJECTIVES, which says for which
models it is. Validation and evaluation score with the objective of the run.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

# Folded into the key of a step before the row, so that what is hidden has nothing to do
# with what is dropped, whose keys have the row folded in at once. No batch has as many
# rows. The number is 'mask' in ASCII.
STREAM = 0x6D61736B
# Of the masks of every evaluation, because scores of different masks do not compare. It
# stands on the cards; with another number new cards would not compare with old ones.
EVALUATION_SEED = 20


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Each symbol is said from those before it."""

    causal: ClassVar[bool] = True  # of the models that it is for

    @classmethod
    def of(cls, train, vocab_size: int) -> NextToken:
        """The objective of the section `train` of a config."""
        del train, vocab_size
        return cls()

    def examples(self, inputs_BT, targets_BT, keys, positions_BT):
        """Returns (inputs_BT, targets_BT, weights_BT); None are equal weights.

        Args:
          inputs_BT, targets_BT: of the stream. With extended context the inputs have
            more columns, on the left.
          keys: one of each row, [B], or one of all.
          positions_BT: a number of each target, or [1, T]. What is drawn for it is a
            function of its key and this number, and of nothing else.
        """
        del keys, positions_BT
        return inputs_BT, targets_BT, None


@dataclasses.dataclass(frozen=True)
class Masked:
    """Some symbols are hidden, and said from all others (Devlin et al. 2019, 3.1).

    Each is hidden with probability `rate`, and always behind the mask symbol. BERT
    leaves a tenth of them as they are and puts any symbol at another tenth, for later
    tasks that show it no mask; models are not tuned to such tasks here.
    """

    causal: ClassVar[bool] = False
    rate: float
    mask_id: int

    @classmethod
    def of(cls, train, vocab_size: int) -> Masked:
        # The mask is one id more than the data has, at the end: no text contains it,
        # and no other id moves.
        return cls(train.mask_rate, vocab_size - 1)

    def examples(self, inputs_BT, targets_BT, keys, positions_BT):
        """Hides inputs, and asks for the symbol at its own place; see NextToken."""
        inputs_BT, targets_BT, hidden_BT = masked(
            inputs_BT,
            keys,
            jnp.broadcast_to(positions_BT, targets_BT.shape),
            rate=self.rate,
            mask_id=self.mask_id,
        )
        return inputs_BT, targets_BT, hidden_BT.astype(jnp.float32)


OBJECTIVES = {"next_token": NextToken, "masked": Masked}


def build(train, model):
    """The objective that config.train names, for a model."""
    return OBJECTIVES[train.objective].of(train, model.vocab_size)


def masked(inputs_BT, keys, positions_BT, *, rate: float, mask_id: int):
    """Hides some of the last inputs, of which each has a position.

    Returns (the inputs with mask_id at the hidden ones, the last inputs as they were,
    which of these are hidden).
    """
    # Leading inputs without a target are extended context, which stays in sight.
    first = inputs_BT.shape[1] - positions_BT.shape[1]
    targets_BT = inputs_BT[:, first:]

    # A key for each position, and not one draw for the shape: however a text is cut
    # into rows and segments, the same tokens of it are hidden.
    def hides(key, position):
        key = jax.random.fold_in(key, position)
        # float32 also where float64 is enabled: the bits decide, and must be the same.
        return jax.random.uniform(key, dtype=jnp.float32) < rate

    keys_B = jnp.broadcast_to(keys, inputs_BT.shape[:1])
    hidden_BT = jax.vmap(jax.vmap(hides, (None, 0)))(keys_B, positions_BT)
    shown_BT = jnp.where(hidden_BT, mask_id, targets_BT)
    return jnp.concatenate([inputs_BT[:, :first], shown_BT], 1), targets_BT, hidden_BT
