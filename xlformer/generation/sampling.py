"""How a next token is drawn.

A new rule is a field of Sampling, with its default and its help, and what `draw` does
with it: the flags of the command are the fields.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from xlformer.errors import Argument, UserError


def _rule(default, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a next token is drawn.

    Attributes:
      temperature: of the softmax; 0 takes the most probable token.
      top_k: draw among this many of the most probable; 0 is all.
      top_p: draw among the most probable that together reach this mass; 1 is all.
    """

    temperature: float = _rule(1.0, "0: the most probable (1.0)")
    top_k: int = _rule(0, "draw among so many; 0 is all (0)")
    top_p: float = _rule(1.0, "among those of this mass (1.0)")

    def __post_init__(self):
        if self.temperature < 0 or not np.isfinite(self.temperature):
            found = Argument("temperature", self.temperature)
            raise UserError(found, " must be finite and not negative")
        if self.top_k < 0:
            raise UserError(Argument("top_k", self.top_k), " must not be negative")
        if not 0 < self.top_p <= 1:
            raise UserError(Argument("top_p", self.top_p), " must be in (0, 1]")

    def draw(self, key: jax.Array, log_probs_RV: jax.Array) -> jax.Array:
        """Draws one token for each row, [R], with one key for all of them."""
        # Below the smallest normal float32 a temperature may be flushed to 0, and the
        # division would give NaN.
        if self.temperature < np.finfo(np.float32).tiny:
            return jnp.argmax(log_probs_RV, axis=-1)
        # With the largest at 0, a small temperature cannot send it to -inf as well.
        logits_RV = log_probs_RV - log_probs_RV.max(axis=-1, keepdims=True)
        logits_RV /= self.temperature
        V = logits_RV.shape[-1]
        # Nothing is cut off: the sort of V logits below is spared.
        if self.top_k in (0, V) and self.top_p == 1:
            return jax.random.categorical(key, logits_RV)
        # The most probable first; of equals those with the smaller id.
        logits_RK, ids_RK = jax.lax.top_k(logits_RV, min(self.top_k or V, V))
        p_RK = jax.nn.softmax(logits_RK)
        # What lies beyond the first tokens that reach the mass is dropped: by the mass
        # before a token, so that the most probable one is kept whatever top_p is.
        before_RK = jnp.cumsum(p_RK, axis=-1) - p_RK
        logits_RK = jnp.where(before_RK < self.top_p, logits_RK, -jnp.inf)
        chosen_R = jax.random.categorical(key, logits_RK)
        return jnp.take_along_axis(ids_RK, chosen_R[:, None], axis=1)[:, 0]


# How the paper made its samples (Dai et al. 2019, arXiv:1901.02860, appendix E).
PAPER_CONTEXT, PAPER_TOKENS, PAPER = 512, 1000, Sampling(top_k=40)


def add_flags(parser) -> None:
    """A flag for each field of Sampling; one that is not given is None."""
    for field in dataclasses.fields(Sampling):
        kind, shown = type(field.default), field.metadata["help"]
        parser.add_argument(f"--{field.name}", type=kind, help=shown)


def from_flags(args, preset: Sampling) -> Sampling:
    """What the flags of add_flags say, and else the preset."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Sampling)}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(preset, **given)
