"""Continues texts: the state is carried, so a token costs the same however many came.

Every token sees memory_length positions and itself, in the prompt too: what scoring
sees with segment_length 1, or with window = memory_length. Absolute positions (types 2
and 3 with memory, which the config has to allow) count anew in every call: there a
prompt is read in parts of PREFILL tokens, and what follows token by token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xlformer import models, sharding
from xlformer.errors import Argument, UserError
from xlformer.generation.sampling import Sampling

PREFILL = 64  # prompt tokens in one compiled call
BLOCK = 16  # generated tokens in one compiled call
MOST = (1 << 31) - BLOCK  # tokens, which int32 counts
PLAIN = Sampling()


def generate(
    model: models.Model,
    params,
    prompts: Sequence[np.ndarray],
    *,
    num_tokens: int,
    seed: int = 0,
    sampling: Sampling = PLAIN,
    mesh: jax.sharding.Mesh | None = None,
    on_tokens: Callable[[np.ndarray], bool | None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Continues every prompt by num_tokens.

    Args:
      model: with a memory; see `for_generation`. Compiled functions are kept for it.
      params: of the model.
      prompts: token ids of each row, at least one; lengths may differ.
      num_tokens: to generate.
      seed: same seed, same prompts, same tokens.
      sampling: how to draw.
      mesh: shares the rows, by default one device; params must lie on it.
      on_tokens: called with each finished block, [R, n]; true ends it.

    Returns:
      tokens_RN, and their log-probabilities in nats under the model itself (at
      temperature 1, nothing cut off).
    """
    text = Continuation(
        model, params, len(prompts), seed=seed, sampling=sampling, mesh=mesh
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
    ):
        """Arguments as for `generate`."""
        self._model, self._params = for_generation(model), params
        self._sampling, self._mesh = sampling, mesh or sharding.make_mesh({"data": 1})
        self._rows = rows
        # Copies of the last row make the rows divide.
        self._more = sharding.padded(rows, self._mesh) - rows
        self._state = None
        self._last_R: np.ndarray | None = None
        self._drawn = 0
        # Row r draws from its own key: its text does not depend on the other rows.
        self._keys_R = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(seed), jnp.arange(rows + self._more)
        )

    def read(self, prompts: Sequence[Sequence[int] | np.ndarray]) -> None:
        """Takes in tokens of each row, at least one; lengths may differ."""
        _check(prompts, self._model.vocab_size)
        prompts = [*prompts, *[prompts[-1]] * self._more]
        if self._last_R is not None:
            prompts = [[x, *p] for x, p in zip(self._last_R, prompts, strict=True)]
        model, mesh = self._model, self._mesh
        self._state = _prefill(model, self._params, prompts, mesh, self._state)
        # The next token is drawn after it, which is when it enters the memory.
        self._last_R = np.array([p[-1] for p in prompts], np.int32)

    def draw(
        self,
        num_tokens: int,
        *,
        on_tokens: Callable[[np.ndarray], bool | None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that may follow what was read; arguments and result as `generate`."""
        if not 1 <= num_tokens <= MOST:
            raise UserError(
                f"num_tokens={num_tokens} must be at least 1 and at most {MOST}"
            )
        mesh, last_R = self._mesh, self._last_R
        state, placed = _cached(self._model, self._params, self._state, mesh)
        tokens, chosen = [], []
        for start in range(0, num_tokens, BLOCK):
            # Where the compiler has put them is not where the next call wants them.
            last_R, keys_R = jax.device_put(
                (last_R, self._keys_R), sharding.replicated(mesh)
            )
            state = jax.device_put(state, placed)
            with jax.set_mesh(mesh):
                (state, last_R), tokens_RN, chosen_RN = _block(
                    self._model,
                    self._sampling,
                    self._params,
                    keys_R,
                    state,
                    last_R,
                    self._drawn,
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


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _block(model, sampling, params, keys_R, state, last_R, start):
    """BLOCK more tokens: ((state, last_R), tokens_RN, their log-probabilities)."""

    def one(carry, index):
        state, last_R = carry
        log_probs_R1V, state = model.log_probs(params, last_R[:, None], state)
        log_probs_RV = log_probs_R1V[:, 0]
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


def for_generation(model: models.Model) -> models.Model:
    """The model whose tokens see the same, however many a call holds."""
    return model.for_generation()


def _check(prompts, vocab_size: int) -> None:
    if not len(prompts) or not all(len(p) for p in prompts):
        line = " is empty: at least one token is needed to continue"
        raise UserError(Argument("prompt"), line)
    for prompt in prompts:
        bad = [i for i in map(int, prompt) if not 0 <= i < vocab_size]
        if bad:
            raise UserError(f"token id out of range: {bad[0]} of {vocab_size} symbols")


def _prefill(model, params, prompts, mesh, state=None):
    """The state after all but the last token of each prompt; None is an empty one."""
    lengths_R = np.array([len(p) - 1 for p in prompts])
    width = PREFILL * -(-int(lengths_R.max()) // PREFILL)
    ids_RT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        ids_RT[row, : len(prompt) - 1] = prompt[:-1]
    state = _empty(model, len(prompts)) if state is None else state
    placed = sharding.carried(mesh, state, model.state_axes())
    state = jax.block_until_ready(jax.device_put(state, placed))
    for start in range(0, width, PREFILL):
        valid_R = np.clip(lengths_R - start, 0, PREFILL).astype(np.int32)
        part_RT = ids_RT[:, start : start + PREFILL]
        with jax.set_mesh(mesh):
            state = _advance(model, params, state, part_RT, valid_R)
            state = jax.device_put(state, placed)
    return state


@functools.partial(jax.jit, static_argnums=0)
def _advance(model, params, state, ids_RT, lengths_R):
    return model.apply(params, ids_RT, ids_RT, state, lengths_B=lengths_R)[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(model, rows: int):
    return model.init_state(rows)


def _cached(model, params, state, mesh):
    """The state in the form for single tokens, and its shardings."""
    axes = model.cache_axes(segment_length=1)
    with jax.set_mesh(mesh):
        state = _to_cache(model, params, state)
    placed = sharding.carried(mesh, state, axes)
    return jax.device_put(state, placed), placed


@functools.partial(jax.jit, static_argnums=0)
def _to_cache(model, params, state):
    # Copied, as what comes of it is donated, and the state is read on later.
    state = jax.tree.map(jnp.copy, state)
    return model.to_cache(params, state, segment_length=1)


def compiled_block(model: models.Model, params, *, rows: int, mesh):
    """The compiled function that generates a block, for what it needs and does.

    Args as for `generate`; rows: how many prompts.
    """
    model, rows = for_generation(model), sharding.padded(rows, mesh)
    state = jax.eval_shape(functools.partial(_empty, model, rows))
    state = jax.eval_shape(functools.partial(_to_cache, model), params, state)
    placed = sharding.carried(mesh, state, model.cache_axes(segment_length=1))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed
    )
    keys_R = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    last_R = jax.ShapeDtypeStruct((rows,), "int32")
    with jax.set_mesh(mesh):
        lowered = _block.lower(model, PLAIN, params, keys_R, state, last_R, 0)
        return lowered.compile()
