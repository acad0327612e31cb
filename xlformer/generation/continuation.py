"""Continues texts: the state is carried, so a token costs the same however many came.

Every token sees what the model carries and itself, in the prompt too: what scoring sees
with segment_length 1. Of a bounded memory that is memory_length positions, as with
window = memory_length. Positions that count anew in every call (absolute ones with a
memory) do so here: a prompt is read in parts of PREFILL tokens, and what follows token
by token. A model without memory may be asked with a window of its last tokens, which
slides: there a token costs a whole window (models/windowed.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xlformer import models, sharding
from xlformer.errors import Argument, UserError
from xlformer.generation.sampling import Sampling
from xlformer.models.parameters import abstract_params

# Prompts are read in parts of one shape, padded on the right: prompts of any lengths
# share one compiled program, and a short one pays for no more than one part.
PREFILL = 64  # prompt tokens in one compiled call; fewer where the model takes fewer
# A block is one dispatch; after each of them `on_tokens` may print, and may end it.
BLOCK = 16  # generated tokens in one compiled call
MOST = (1 << 31) - BLOCK  # tokens, which int32 counts
PLAIN = Sampling()
EMPTY = " is empty: at least one token is needed to continue"


def generate(
    model: models.Model,
    params,
    prompts: Sequence[np.ndarray],
    *,
    num_tokens: int,
    seed: int = 0,
    sampling: Sampling = PLAIN,
    mesh: jax.sharding.Mesh | None = None,
    step: int | None = None,
    on_tokens: Callable[[np.ndarray], bool | None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Continues every prompt by num_tokens.

    Where the mesh has devices of several hosts all of them must call it, with equal
    arguments; all get the same tokens.

    Args:
      model: see `for_generation`. Compiled functions are kept for it.
      params: of the model.
      prompts: token ids of each row, at least one; lengths may differ.
      num_tokens: to generate.
      seed: same seed, same prompts, same tokens.
      sampling: how to draw.
      mesh: shares the rows, by default one device; params must lie on it.
      step: of the checkpoint, for schedules inside the model.
      on_tokens: called with each finished block, [R, n]; true ends it.

    Returns:
      tokens_RN, and their log-probabilities in nats under the model itself (at
      temperature 1, nothing cut off).
    """
    rows = len(prompts)
    text = Continuation(
        model, params, rows, seed=seed, sampling=sampling, mesh=mesh, step=step
    )
    text.read(prompts)
    return text.draw(num_tokens, on_tokens=on_tokens)


class Continuation:
    """Rows that are read and continued by turns, with one memory.

    `read` takes tokens in. What `draw` gives is not taken in: the part that shall stay
    is read with what comes after it, so that turns equal one long text whatever was
    drawn beyond their ends.
    """

    def __init__(
        self,
        model: models.Model,
        params,
        rows: int,
        *,
        seed: int = 0,
        sampling: Sampling = PLAIN,
        mesh: jax.sharding.Mesh | None = None,
        step: int | None = None,
    ):
        """Arguments as for `generate`."""
        model, mesh = for_generation(model), mesh or sharding.make_mesh({"data": 1})
        self._rows, self._vocab_size = rows, model.vocab_size
        # Copies of the last row make the rows divide by the devices that share them.
        self._more = sharding.padded(rows, mesh) - rows
        self._programs = programs(model, mesh, rows + self._more)
        self._part = min(PREFILL, model.longest_segment or PREFILL)
        self._params, self._sampling, self._mesh = params, sampling, mesh
        self._step = None if step is None else np.int32(step)
        self._seed = np.uint32(seed & 0xFFFFFFFF)  # JAX's keys have 32 bits of it
        self._state = None
        self._last_R: np.ndarray | None = None
        self._drawn = 0

    def read(self, prompts: Sequence[Sequence[int] | np.ndarray]) -> None:
        """Takes in tokens of each row, at least one; lengths may differ."""
        _check(prompts, self._vocab_size)
        prompts = [*prompts, *[prompts[-1]] * self._more]
        # The last token of the previous turn was held back: see below.
        if self._last_R is not None:
            prompts = [[x, *p] for x, p in zip(self._last_R, prompts, strict=True)]
        with jax.set_mesh(self._mesh):
            state = self._programs.empty() if self._state is None else self._state
            state = jax.block_until_ready(state)  # or there is no room
            for ids_RT, valid_R in _parts(prompts, self._part):
                part = ids_RT, valid_R, self._step
                state = self._programs.advance(self._params, state, *part)
        self._state = state
        # The last token of each row is kept out of the state. `draw` reads it first,
        # to draw what comes after it, and so it enters the memory exactly once.
        self._last_R = np.array([p[-1] for p in prompts], np.int32)

    def draw(
        self,
        num_tokens: int,
        *,
        on_tokens: Callable[[np.ndarray], bool | None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that may follow what was read; arguments and result as `generate`."""
        if not 1 <= num_tokens <= MOST:
            line = f" must be at least 1 and at most {MOST}"
            raise UserError(Argument("num_tokens", num_tokens), line)
        with jax.set_mesh(self._mesh):
            state = self._programs.cached(self._params, self._state)
            # Where a block leaves them: else the second call would compile anew.
            last_R = jax.device_put(self._last_R, sharding.replicated(self._mesh))
        tokens, chosen = [], []
        for start in range(0, num_tokens, BLOCK):
            at = self._seed, self._drawn, self._step
            with jax.set_mesh(self._mesh):
                (state, last_R), tokens_RN, chosen_RN = self._programs.block(
                    self._sampling, self._params, state, last_R, *at
                )
            size = min(BLOCK, num_tokens - start)
            self._drawn += size
            tokens.append(np.asarray(tokens_RN)[: self._rows, :size])
            chosen.append(np.asarray(chosen_RN)[: self._rows, :size])
            if not np.isfinite(chosen[-1]).all():
                raise UserError(
                    "the model gives no probabilities but NaN: its weights, or what "
                    "they make of this prompt, are not finite; try ",
                    Argument("checkpoint"),
                )
            if on_tokens is not None and on_tokens(tokens[-1]):
                break
        return np.concatenate(tokens, axis=1), np.concatenate(chosen, axis=1)


def for_generation(model: models.Model) -> models.Model:
    """The model whose tokens see the same, however many a call holds."""
    return model.for_generation()


def _check(prompts, vocab_size: int) -> None:
    if not len(prompts):
        raise UserError(Argument("prompt"), EMPTY)
    for prompt in prompts:
        ids = np.asarray(prompt)
        if ids.ndim == 1 and not ids.size:
            raise UserError(Argument("prompt"), EMPTY)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UserError(
                f"prompts are rows of token ids, as vocabulary.encode gives them, not "
                f"{prompt!r:.50}"
            )
        bad = ids[(ids < 0) | (ids >= vocab_size)]
        if bad.size:
            raise UserError(f"token id out of range: {bad[0]} of {vocab_size} symbols")


def _parts(prompts, T: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All but the last token of each prompt, in parts of T: ids_RT, how many count."""
    lengths_R = np.array([len(p) - 1 for p in prompts])
    # Rounded up to whole parts. A prompt of one token has none: `draw` reads it.
    width = T * -(-int(lengths_R.max()) // T)
    ids_RT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        ids_RT[row, : len(prompt) - 1] = prompt[:-1]
    for start in range(0, width, T):
        valid_R = np.clip(lengths_R - start, 0, T).astype(np.int32)
        yield ids_RT[:, start : start + T], valid_R


class Programs:
    """What is compiled for a model and so many rows on a mesh; to be called within it.

    Each result lies where the next call wants it, also on several hosts.

    Attributes:
      empty: () -> the state before the first token.
      advance: (params, state, ids_RT, lengths_R, step) -> the state after them.
      cached: (params, state) -> a copy in the form for single tokens.
      block: (sampling, params, copy, last_R, seed, start, step) -> BLOCK more tokens:
        ((copy, last_R), tokens_RN, their log-probabilities). The copy is donated.
      cache: the shapes and shardings of such a copy.
    """

    def __init__(self, model: models.Model, mesh: jax.sharding.Mesh, rows: int):
        self._model, self._rows = model, rows
        params = abstract_params(model)
        state = jax.eval_shape(self._empty)
        placed = sharding.model_state(mesh, state, model.state_axes())
        self.cache = jax.eval_shape(self._cached, params, state)
        axes = model.cache_axes(segment_length=1)
        cached = sharding.model_state(mesh, self.cache, axes)
        self.cache = sharding.with_shardings(self.cache, cached)
        whole = sharding.replicated(mesh)
        self.empty = jax.jit(self._empty, out_shardings=placed)
        self.advance = jax.jit(self._advance, out_shardings=placed)
        self.cached = jax.jit(self._cached, out_shardings=cached)
        self.block = jax.jit(
            self._block,
            static_argnums=0,
            donate_argnums=2,
            out_shardings=((cached, whole), whole, whole),
        )

    def _empty(self):
        return self._model.init_state(self._rows)

    def _advance(self, params, state, ids_RT, lengths_R, step):
        # The targets are of no interest: without the nll in the result, the compiler
        # leaves out the softmax that would make it.
        _, state, _ = self._model.apply(
            params, ids_RT, ids_RT, state, lengths_B=lengths_R, step=step
        )
        return state

    def _cached(self, params, state):
        # `block` donates the result, and a model may return its state unchanged. The
        # next turn reads on from the state, so the two must not share arrays.
        state = jax.tree.map(jnp.copy, state)
        return self._model.to_cache(params, state, segment_length=1)

    def _block(self, sampling, params, state, last_R, seed, start, step):
        # Row r draws from its own key: its text does not depend on the other rows.
        keys_R = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(seed), jnp.arange(self._rows)
        )

        def one(carry, index):
            state, last_R = carry
            log_probs_R1V, state = self._model.log_probs(
                params, last_R[:, None], state, step=step
            )
            log_probs_RV = log_probs_R1V[:, 0]
            # Keys go by the token's number: blocks of any size draw the same text.
            step_keys_R = jax.vmap(jax.random.fold_in, (0, None))(keys_R, index)
            next_R = jax.vmap(lambda k, p: sampling.draw(k, p[None])[0])(
                step_keys_R, log_probs_RV
            ).astype(jnp.int32)
            chosen_R = jnp.take_along_axis(log_probs_RV, next_R[:, None], axis=1)[:, 0]
            return (state, next_R), (next_R, chosen_R)

        carry, (tokens_NR, chosen_NR) = jax.lax.scan(
            one, (state, last_R), start + jnp.arange(BLOCK)
        )
        return carry, tokens_NR.T, chosen_NR.T


# A model is hashed by its config: equal models share what was compiled. Programs hold
# shapes and no parameters, so that keeping sixteen of them keeps no weights alive.
@functools.lru_cache(maxsize=16)
def programs(model: models.Model, mesh: jax.sharding.Mesh, rows: int) -> Programs:
    """The programs of a model, kept for whoever asks for them again."""
    return Programs(model, mesh, rows)


def compiled_block(model: models.Model, params, *, rows: int, mesh):
    """The compiled function that generates a block, for what it needs and does.

    Args as for `generate`; rows: how many prompts.
    """
    rows = sharding.padded(rows, mesh)
    found = programs(for_generation(model), mesh, rows)
    last_R = jax.ShapeDtypeStruct((rows,), "int32")
    with jax.set_mesh(mesh):
        lowered = found.block.lower(
            PLAIN, params, found.cache, last_R, np.uint32(0), 0, np.int32(0)
        )
        return lowered.compile()
