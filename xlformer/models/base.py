"""The contract: a language model is a pure function with carried state.

    params = model.init(key)
    state = model.init_state(batch_size)
    nll_BT, state, aux = model.apply(params, inputs_BT, targets_BT, state)

Training, evaluation, generation and `testing.check_model` know nothing else. A model
of one's own subclasses `Model` and defines init, init_state, state_axes and apply, and
log_probs where it shall generate; everything else has a default. A model made of a
stack of layers over vectors need not even do that: see `tokens.TokenModel`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from xlformer.errors import Argument, UserError
from xlformer.models import sides


class Aux(NamedTuple):
    """What a model returns beside the nll.

    Both are means over the rows of the call: groups of rows (micro-batches, devices)
    are averaged, so that a sum would depend on their number.

    Attributes:
      loss: scalar to add to the mean nll (already weighted).
      metrics: dict of scalars that are only logged.
    """

    loss: Any
    metrics: dict


def compute_dtype(name: str, params=None):
    """The dtype to compute in: float64 if the parameters are, else what `name` says.

    'auto' is bfloat16 where it is native (TPU, compute capability >= 8.0), else
    float32.
    """
    leaves = jax.tree.leaves(params)
    # Whatever the config says: parity with the originals and `check_model` are tested
    # in float64, also for configs that ask for bfloat16.
    if any(leaf.dtype == jnp.float64 for leaf in leaves):
        return jnp.dtype("float64")
    if name != "auto":
        return jnp.dtype(name)
    device = jax.devices()[0]  # All devices of a job are of one kind.
    native = device.platform == "tpu"
    if device.platform == "gpu":
        # NVIDIA's is a number; AMD's, such as gfx90a, says nothing of bfloat16.
        major, _, _ = str(device.compute_capability).partition(".")
        native = major.isdecimal() and int(major) >= 8
    return jnp.dtype(jnp.bfloat16 if native else jnp.float32)


@dataclasses.dataclass(frozen=True)
class Model:
    """A frozen configuration and the pure functions that it defines.

    config is a frozen dataclass with a vocab_size: a model is compared and hashed by
    it, and compiled functions are kept for equal models.
    """

    config: Any
    # The class of `config`; only a model that has a name in MODELS needs it.
    Config: ClassVar[Any]

    # What every model has to define ---------------------------------------------------

    def init(self, key: jax.Array):
        """Fresh parameters: a tree of arrays in float32."""
        raise NotImplementedError

    def init_state(self, batch_size: int, dtype=None):
        """The state before the first token: fixed shapes, nothing valid in it.

        dtype defaults to the compute dtype; `apply` returns the state in the dtype that
        it computed in.
        """
        raise NotImplementedError

    def state_axes(self):
        """Logical axis names of each leaf of the state; 'batch' is among them."""
        raise NotImplementedError

    def apply(
        self,
        params,
        inputs_BT: jax.Array,
        targets_BT: jax.Array,
        state,
        *,
        resets_BT: jax.Array | None = None,
        lengths_B: jax.Array | int | None = None,
        step: jax.Array | None = None,
        train: bool = False,
        rngs: dict | None = None,
    ):
        """Scores the targets and carries the state over the segment.

        Args:
          params: what `init` returns. In float64 they give a float64 computation.
          inputs_BT: token ids. With extended_length E up to E more than targets; the
            extra ones lead.
          targets_BT: the next token of each of the last inputs.
          state: of `init_state`, or of the call before.
          resets_BT: true where a token and all after it see nothing before it; [B, 1]
            is a reset before the segment, the only form if not resets_in_segment.
          lengths_B: valid inputs of each row, or one number; the rest is padding on
            the right: it enters no memory and its nll is 0.
          step: of the training, for schedules inside a model; in evaluation and
            generation that of the checkpoint. None where there is none.
          train: what only training does, such as dropout; see needs_rngs.
          rngs: 'dropout', one key; and 'rows', a key for each row, [B], by default
            folded from it. What differs between rows must be drawn from 'rows': under a
            mesh each device calls this with its own rows. Before drawing what rows
            share, fold a large number of your own into 'dropout': fold_in(key, i) is
            the key of row i, and split(key)[i] is the same.

        Returns:
          nll_BT in nats, in position order; the new state, without gradient; Aux.
        """
        raise NotImplementedError

    # What generation needs ------------------------------------------------------------

    def log_probs(
        self, params, inputs_BT, state, *, resets_BT=None, lengths_B=None, step=None
    ):
        """log p of every next token, [B, T, V], and the new state.

        For generation and small vocabularies: T x V numbers a row.
        """
        raise UserError(f"{type(self).__name__} has no log_probs: it cannot generate")

    def for_generation(self) -> Model:
        """The model whose tokens see the same, however many a call holds.

        Raises UserError where a model cannot continue a text.
        """
        # Either would give text, and no error: of a model that was never trained to
        # say what comes next, or of one that forgets each token at once.
        if not self.causal:
            raise UserError(
                f"{type(self).__name__} sees what comes after a token (causal=False): "
                "it can be scored, but it cannot continue a text"
            )
        if self.memory_length == 0:
            raise UserError(
                "a memory of 0 carries nothing from token to token: generating needs ",
                Argument("memory_length", 1),
                " or more",
            )
        return self

    def to_cache(self, params, state, *, segment_length: int = 1):
        """The state in the form that scoring and generation like; by default itself.

        `apply`, `log_probs` and the trunk take it and return the same form, and give
        the numbers that they give for `state`. It belongs to these parameters: it may
        hold what was computed from them, so it passes no gradients on to them, knows
        no dropout, and has no place in a checkpoint.

        Args:
          params: those that will be used with it.
          state: of `init_state`, or what `apply` returned for one.
          segment_length: the most inputs of a call. With 1 all rows advance together:
            no lengths_B.
        """
        del params, segment_length
        return state

    def cache_axes(self, *, segment_length: int = 1):
        """Logical axis names of what `to_cache` returns, in the form of state_axes.

        A leaf without 'batch' belongs to all rows.
        """
        del segment_length
        return self.state_axes()

    # What others ask of a model -------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.config.vocab_size

    @property
    def causal(self) -> bool:
        """Whether no output depends on a later input."""
        return True

    @property
    def memory_length(self) -> int | None:
        """How many earlier positions each layer sees; None is without limit."""
        return None

    @property
    def extended_length(self) -> int:
        """How many leading inputs are recomputed context without a target."""
        return 0

    @property
    def sight(self) -> int | None:
        """How many last tokens alone decide what follows; None: any may play a part."""
        return None

    @property
    def longest_segment(self) -> int | None:
        """The most targets of one call; None is without limit.

        So it is where learned positions end.
        """
        return None

    @property
    def segments_equal_one_pass(self) -> bool:
        """Whether segments of any sizes give what one pass over all of them gives.

        That is promised as long as no segment starts later than memory_length; from
        there on a bounded memory has lost what one pass still sees. False for absolute
        positions, which count anew in each segment, and where a token sees what comes
        after it, of its own segment.
        """
        return self.causal

    @property
    def segments_of_any_length(self) -> bool:
        """Whether a score is the same however a text is cut into segments."""
        return False

    @property
    def positions_from_end(self) -> bool:
        """Whether an output depends on how many inputs of its segment follow.

        So it does where absolute positions count backwards. Where True, and where
        `causal` is False, scoring says with lengths_B where the text ends.
        """
        return True

    @property
    def resets_in_segment(self) -> bool:
        """Whether a reset may lie inside a segment; else only before it, as [B, 1]."""
        return True

    @property
    def needs_rngs(self) -> bool:
        """Whether train=True draws random numbers, so that it needs `rngs`.

        By default where the config has a dropout that is not 0.
        """
        return bool(getattr(self.config, "dropout", 0))

    @property
    def trunk(self):
        """The model without its tokens, vectors in and out (tokens.Trunk), or None."""
        return None

    @property
    def width(self) -> int | None:
        """How long the vectors that the trunk takes are; None without a trunk."""
        return None

    def dtype(self, params):
        """The dtype of the computation with these parameters; None if not known."""
        # Integers among the parameters say nothing about the dtype of computation.
        leaves = [leaf.dtype for leaf in jax.tree.leaves(params)]
        found = [d for d in leaves if jnp.issubdtype(d, jnp.floating)]
        return jnp.result_type(*found) if found else None

    def replay(self, segment_length: int) -> int | None:
        """Segments that scoring replays before a row to carry what one row would have.

        None is without limit: what is true of any state if nothing is known of it but
        how many positions a layer sees, because layers reach back through layers. 0 is
        no state. Extended context counts: a row's first inputs see nothing before it.
        """
        if self.memory_length == 0:
            return -(-self.extended_length // segment_length)
        return None

    def for_reading(self, **fields) -> Model:
        """Returns the model with other values in its config; -1 and None keep its own.

        Evaluation asks for another memory or visibility with it. Raises UserError for
        a field that the config does not have.
        """
        changes = {k: v for k, v in fields.items() if v is not None and v != -1}
        known = {f.name for f in dataclasses.fields(self.config)} if changes else ()
        for name in sorted(set(changes) - set(known)):
            line = f": {type(self).__name__} has no {name}"
            raise UserError(Argument(name, changes[name]), line)
        if not changes:
            return self
        try:
            config = dataclasses.replace(self.config, **changes)
        except UserError as error:
            # Who asked named no config.model.
            asked = [part for x in changes.items() for part in (Argument(*x), ": ")]
            raise UserError(*asked, *error.parts) from error
        return dataclasses.replace(self, config=config)

    def for_training(self, steps: int) -> Model:
        """The model as a run of so many steps trains it, by default as it is.

        Its parameters are those of this one. A schedule inside a model that ends with
        the run is made here: what `apply` gets is the step alone.
        """
        del steps
        return self

    def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
        """Raises UserError where the model cannot be split over this mesh."""

    def param_axes(self, params):
        """Logical axis names of each leaf of `params`, a tree of arrays or shapes.

        sharding.RULES says which names a mesh splits. By default nothing is split.
        """
        return jax.tree.map(lambda leaf: (None,) * len(leaf.shape), params)

    def matrices(self, params):
        """A tree of sides.Sides, the axes of matrices, with None for other leaves.

        Optimizers that treat matrices by themselves ask for it (Muon). None is what is
        no matrix, or not within the model: biases, norms, embeddings, softmax. By
        default a leaf of two axes is one, not counting that of stacked layers.
        """
        return sides.of_two_axes(params)

    def flops(
        self,
        *,
        batch_size: int,
        segment_length: int,
        shares: Sequence[float] | None = None,
        cached: bool = False,
    ):
        """Useful FLOPs of one segment of all rows, or None where they are not known.

        Args:
          batch_size, segment_length: how many targets; extended context comes on top.
          shares: of the targets in each bin of an adaptive softmax; by default Zipf's
            law.
          cached: with the state of `to_cache`, as in evaluation.

        Returns:
          An object with the floats `forward` and `training` (backward included).
        """
        del batch_size, segment_length, shares, cached

    def kept_for_backward(self) -> float | None:
        """Numbers a token that stay on a device for the backward pass of a step.

        `xlformer.plan` estimates memory with it where nothing is compiled. None where
        it is not known.
        """
        return None

    def summed_activations(self) -> float | None:
        """Numbers a token that a training step sums over devices that share heads.

        `xlformer.plan` counts traffic with it; None where it is not known.
        """
        return None

    def to_save_memory(self) -> dict[str, Any]:
        """Fields of the config and their values with which a step takes less memory.

        {} where there is nothing left to save.
        """
        return {}

    def inspect(self, params, inputs_BT, state, *, resets_BT=None, step=None):
        """What goes on inside over a segment: (Inside, the new state), or None.

        None where nothing of it is known. It may make an array of all pairs of tokens:
        for a small part of a text. Args as for `apply`.
        """
        del params, inputs_BT, state, resets_BT, step

    def card(self) -> dict:
        """What the card of a result says of the model: how far it sees."""
        return {
            "memory_length": self.memory_length,
            "extended_length": self.extended_length,
        }
