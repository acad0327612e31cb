"""Continues a text: python -m xlformer.generate --workdir=DIR --prompt="...".

The state is carried, so a token costs the same however many came before it. Every token
sees memory_length positions and itself, in the prompt too: what scoring sees with
segment_length 1, or with window = memory_length.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from xlformer import command, models, runs, scored_text, sharding
from xlformer.errors import UserError

OPENING = 32  # tokens of the test split that are continued where no prompt is given
PREFILL = 64  # prompt tokens in one compiled call
BLOCK = 16  # generated tokens in one compiled call
PAPER_CONTEXT, PAPER_TOP_K, PAPER_TOKENS = 512, 40, 1000


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a next token is drawn.

    Attributes:
      temperature: of the softmax; 0 takes the most probable token.
      top_k: draw among this many of the most probable; 0 is all.
      top_p: draw among the most probable that together reach this mass; 1 is all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or not np.isfinite(self.temperature):
            raise UserError(
                f"--temperature={self.temperature} must be finite and not negative"
            )
        if self.top_k < 0:
            raise UserError(f"--top_k={self.top_k} must not be negative")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p={self.top_p} must be in (0, 1]")

    def draw(self, key: jax.Array, log_probs_RV: jax.Array) -> jax.Array:
        """One token a row."""
        if self.temperature < np.finfo(np.float32).tiny:
            return jnp.argmax(log_probs_RV, axis=-1)
        # A small temperature must not send the largest one to -inf too.
        logits_RV = log_probs_RV - log_probs_RV.max(axis=-1, keepdims=True)
        logits_RV /= self.temperature
        V = logits_RV.shape[-1]
        if self.top_k in (0, V) and self.top_p == 1:
            return jax.random.categorical(key, logits_RV)
        # The most probable first; of equals those with the smaller id.
        logits_RK, ids_RK = jax.lax.top_k(logits_RV, min(self.top_k or V, V))
        p_RK = jax.nn.softmax(logits_RK)
        # What lies beyond the first tokens that reach the mass is dropped.
        before_RK = jnp.cumsum(p_RK, axis=-1) - p_RK
        logits_RK = jnp.where(before_RK < self.top_p, logits_RK, -jnp.inf)
        chosen_R = jax.random.categorical(key, logits_RK)
        return jnp.take_along_axis(ids_RK, chosen_R[:, None], axis=1)[:, 0]


def generate(
    model: models.Model,
    params,
    prompts: Sequence[np.ndarray],
    *,
    num_tokens: int,
    seed: int = 0,
    sampling: Sampling = Sampling(),
    mesh: jax.sharding.Mesh | None = None,
    on_tokens: Callable[[np.ndarray], None] | None = None,
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
      on_tokens: called with each finished block, [R, n].

    Returns:
      tokens_RN, and their log-probabilities in nats under the model itself (at
      temperature 1, nothing cut off).
    """
    if num_tokens < 1:
        raise UserError(f"num_tokens={num_tokens} must be at least 1")
    model, count = for_generation(model), len(prompts)
    mesh = mesh or sharding.make_mesh({"data": 1})
    # Copies of the last prompt make the rows divide.
    more = sharding.padded(count, mesh) - count
    state, last_R = _prefill(model, params, [*prompts, *prompts[-1:] * more], mesh)
    state, placed = _cached(model, params, state, mesh)
    # Row r draws from its own key: its text does not depend on the other rows.
    keys_R = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(count + more)
    )
    tokens, chosen = [], []
    for start in range(0, num_tokens, BLOCK):
        # Where the compiler has put them is not where the next call wants them.
        last_R, keys_R = jax.device_put((last_R, keys_R), sharding.replicated(mesh))
        state = jax.device_put(state, placed)
        with jax.set_mesh(mesh):
            (state, last_R), tokens_RN, chosen_RN = _block(
                model, sampling, params, keys_R, state, last_R, start
            )
        size = min(BLOCK, num_tokens - start)
        tokens.append(np.asarray(tokens_RN)[:count, :size])
        chosen.append(np.asarray(chosen_RN)[:count, :size])
        if on_tokens is not None:
            on_tokens(tokens[-1])
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
    """The model whose tokens see the same, however many a call holds.

    Extended context has no place here: nothing is recomputed, the memory takes all.
    """
    M = model.memory_length
    if M is None:
        return model
    if M == 0:
        raise UserError(
            "config.model.memory_length=0 carries nothing from token to token: pass "
            "--memory_length"
        )
    window = getattr(model.config, "attention_window", None)
    window = M if window is None else min(window, M)
    changes = {"window": window}
    if model.extended_length:
        changes["extended_length"] = 0
    return runs.for_reading(model, changes)


def _prefill(model, params, prompts, mesh):
    """The state after all but the last token of each prompt, and that token."""
    if not prompts or not all(len(p) for p in prompts):
        raise UserError("--prompt is empty: at least one token is needed to continue")
    for prompt in prompts:
        bad = [i for i in map(int, prompt) if not 0 <= i < model.vocab_size]
        if bad:
            raise UserError(
                f"token id out of range: {bad[0]} of {model.vocab_size} symbols"
            )
    lengths_R = np.array([len(p) - 1 for p in prompts])
    width = PREFILL * -(-int(lengths_R.max()) // PREFILL)
    ids_RT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        ids_RT[row, : len(prompt) - 1] = prompt[:-1]
    state = _empty(model, len(prompts))
    placed = sharding.carried(mesh, state, model.state_axes())
    state = jax.block_until_ready(jax.device_put(state, placed))
    for start in range(0, width, PREFILL):
        valid_R = np.clip(lengths_R - start, 0, PREFILL).astype(np.int32)
        part_RT = ids_RT[:, start : start + PREFILL]
        with jax.set_mesh(mesh):
            state = _advance(model, params, state, part_RT, valid_R)
            state = jax.device_put(state, placed)
    return state, np.array([p[-1] for p in prompts], np.int32)


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
        lowered = _block.lower(model, Sampling(), params, keys_R, state, last_R, 0)
        return lowered.compile()


class Printer:
    """Writes the first row as it grows, whole characters only.

    What a token looks like may depend on the one before it (a space between words, the
    bytes of one character), so a block is decoded together with the last one written.
    """

    def __init__(self, vocabulary, prompt: np.ndarray):
        self._vocabulary = vocabulary
        self._before: list[int] = []  # written already; context of what follows
        self._waiting: list[int] = prompt.tolist()

    def __call__(self, tokens_RN: np.ndarray) -> None:
        self._waiting += tokens_RN[0].tolist()
        self._write(final=False)

    def finish(self) -> None:
        """Writes what waited for the rest of a character."""
        self._write(final=True)
        print()

    def _write(self, final: bool) -> None:
        old = _text(self._vocabulary, self._before)
        text = _text(self._vocabulary, [*self._before, *self._waiting])
        if text.endswith("\ufffd") and not final:
            return
        sys.stdout.write(text[len(old) :])
        sys.stdout.flush()
        self._before, self._waiting = self._waiting or self._before, []


def _text(vocabulary, ids) -> str:
    decoded = vocabulary.decode(np.asarray(ids))
    if isinstance(decoded, bytes):
        return codecs.decode(decoded, "utf-8", "replace")
    return decoded


def _prompts(args, run: runs.Run) -> list[np.ndarray]:
    vocabulary = run.vocabulary
    texts = [("--prompt", text) for text in args.prompt or []]
    if args.prompt_file is not None:
        where = f"--prompt_file={args.prompt_file}"
        try:
            texts.append((where, epath.Path(args.prompt_file).read_bytes()))
        except OSError as error:
            raise UserError(f"{where}: {error}") from error
    if not texts and not runs.names_data(run.config):
        raise UserError("nothing to continue: pass --prompt or --prompt_file")
    prompts = [vocabulary.encode(x, close_line=False, where=w) for w, x in texts]
    for (where, _), prompt in zip(texts, prompts, strict=True):
        if not len(prompt):
            raise UserError(f"{where} is empty: at least one token is needed")
    if not texts:
        tokens, _, _ = scored_text.read(run, "test", None, args.data_path)
        prompts = [np.asarray(tokens[:OPENING])]
    if args.preset == "paper":
        prompts = [p[-PAPER_CONTEXT:] for p in prompts]
    return [p for p in prompts for _ in range(args.num_samples)]


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.generate", description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--prompt_file", help="a file whose text is one more prompt")
    parser.add_argument(
        "--data_path", help="where the run's own text lies now, continued by default"
    )
    parser.add_argument("--num_tokens", type=int)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_samples", type=int, default=1, help="of each prompt")
    parser.add_argument(
        "--preset", choices=["paper"], help="512 context, top 40, 1,000"
    )
    parser.add_argument("--memory_length", type=int)
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument("--params", help="raw or ema; default: ema where it is kept")
    parser.add_argument("--mesh", default="data=-1", help=sharding.MESH_HELP)
    args = parser.parse(argv)
    paper = args.preset == "paper"
    if args.num_tokens is None:
        args.num_tokens = PAPER_TOKENS if paper else 256
    if args.top_k is None:
        args.top_k = PAPER_TOP_K if paper else 0
    if args.num_tokens < 1 or args.num_samples < 1:
        raise UserError(
            f"--num_tokens={args.num_tokens} and --num_samples={args.num_samples} must "
            "be at least 1"
        )
    if not 0 <= args.seed < 1 << 32:
        raise UserError(f"--seed={args.seed} must be from 0 to {(1 << 32) - 1}")
    if args.memory_length is not None and args.memory_length < -1:
        raise UserError(
            f"--memory_length={args.memory_length} must not be negative "
            "(-1: the model's)"
        )
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    mesh = sharding.make_mesh(sharding.parse_mesh(args.mesh), where="--mesh")
    run = runs.load(
        args.workdir, checkpoint=args.checkpoint, params=args.params, mesh=mesh
    )
    model = runs.for_reading(run.model, {"memory_length": args.memory_length})
    prompts = _prompts(args, run)
    printer = Printer(run.vocabulary, prompts[0])
    tokens_RN, _ = generate(
        model,
        run.params,
        prompts,
        num_tokens=args.num_tokens,
        seed=args.seed,
        sampling=sampling,
        mesh=mesh,
        on_tokens=printer,
    )
    printer.finish()
    for row in range(1, len(prompts)):
        text = _text(run.vocabulary, [*prompts[row], *tokens_RN[row]])
        print(f"--- {row + 1} of {len(prompts)}\n{text}")
    return 0


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
