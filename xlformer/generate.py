"""Continues a text: python -m xlformer.generate --workdir=DIR --prompt="...".

The state is carried, so a token costs the same however many came before it. Every token
sees memory_length positions and itself, in the prompt too: what scoring sees with
segment_length 1, or with window = memory_length.
"""

from __future__ import annotations

import codecs
import dataclasses
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from xlformer import command, models, runs
from xlformer.errors import UserError

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
            raise UserError(f"--temperature={self.temperature} must not be negative")
        if self.top_k < 0:
            raise UserError(f"--top_k={self.top_k} must not be negative")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p={self.top_p} must be in (0, 1]")

    def draw(self, key: jax.Array, log_probs_RV: jax.Array) -> jax.Array:
        """One token a row."""
        if self.temperature == 0:
            return jnp.argmax(log_probs_RV, axis=-1)
        logits_RV = log_probs_RV / self.temperature
        if 0 < self.top_k < logits_RV.shape[-1]:
            least_R = jax.lax.top_k(logits_RV, self.top_k)[0][:, -1]
            logits_RV = jnp.where(logits_RV < least_R[:, None], -jnp.inf, logits_RV)
        if self.top_p < 1:
            logits_RV = _keep_mass(logits_RV, self.top_p)
        return jax.random.categorical(key, logits_RV)


def _keep_mass(logits_RV, top_p):
    """Drops what lies beyond the first tokens that reach the mass, never the first."""
    sorted_RV = jnp.sort(logits_RV, axis=-1, descending=True)
    p_RV = jax.nn.softmax(sorted_RV)
    before_RV = jnp.cumsum(p_RV, axis=-1) - p_RV
    least_R = jnp.where(before_RV < top_p, sorted_RV, jnp.inf).min(axis=-1)
    return jnp.where(logits_RV < least_R[:, None], -jnp.inf, logits_RV)


def generate(
    model: models.Model,
    params,
    prompts: Sequence[np.ndarray],
    *,
    num_tokens: int,
    seed: int = 0,
    sampling: Sampling = Sampling(),
    on_tokens: Callable[[np.ndarray], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Continues every prompt by num_tokens.

    Args:
      model: with a memory; see `for_generation`.
      params: of the model.
      prompts: token ids of each row, at least one; lengths may differ.
      num_tokens: to generate.
      seed: same seed, same prompts, same tokens.
      sampling: how to draw.
      on_tokens: called with each finished block, [R, n].

    Returns:
      tokens_RN, and their log-probabilities in nats under the model itself (at
      temperature 1, nothing cut off).
    """
    model = for_generation(model)
    state, last_R = _prefill(model, params, prompts)
    # Row r draws from its own key: its text does not depend on the other rows.
    keys_R = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(len(prompts))
    )

    @jax.jit
    def block(params, state, last_R, start):
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

    tokens, chosen = [], []
    for start in range(0, num_tokens, BLOCK):
        (state, last_R), tokens_RN, chosen_RN = block(params, state, last_R, start)
        count = min(BLOCK, num_tokens - start)
        tokens.append(np.asarray(tokens_RN)[:, :count])
        chosen.append(np.asarray(chosen_RN)[:, :count])
        if on_tokens is not None:
            on_tokens(tokens[-1])
    return np.concatenate(tokens, axis=1), np.concatenate(chosen, axis=1)


def for_generation(model: models.Model) -> models.Model:
    """The model whose tokens see the same, however many a call holds."""
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
    return runs.for_reading(model, {"window": window})


def _prefill(model, params, prompts):
    """The state after all but the last token of each prompt, and that token."""
    if not prompts or not all(len(p) for p in prompts):
        raise UserError("--prompt is empty: at least one token is needed to continue")
    lengths_R = np.array([len(p) - 1 for p in prompts])
    width = PREFILL * -(-int(lengths_R.max()) // PREFILL)
    ids_RT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        ids_RT[row, : len(prompt) - 1] = prompt[:-1]

    @jax.jit
    def advance(params, state, ids_RT, lengths_R):
        return model.apply(params, ids_RT, ids_RT, state, lengths_B=lengths_R)[1]

    state = model.init_state(len(prompts))
    for start in range(0, width, PREFILL):
        valid_R = np.clip(lengths_R - start, 0, PREFILL).astype(np.int32)
        state = advance(params, state, ids_RT[:, start : start + PREFILL], valid_R)
    return state, jnp.array([p[-1] for p in prompts], jnp.int32)


class _Printer:
    """Writes the first row to the terminal as it grows, whole characters only."""

    def __init__(self, vocabulary):
        self._vocabulary, self._written, self._tokens = vocabulary, "", []

    def __call__(self, tokens_RN):
        self._tokens.extend(tokens_RN[0].tolist())
        text = _text(self._vocabulary, self._tokens)
        if not text.startswith(self._written):
            return  # A piece changed what came before it; the end shows all of it.
        # The last characters may still change while a multi-byte one is incomplete.
        safe = text.rstrip("\ufffd")
        sys.stdout.write(safe[len(self._written) :])
        sys.stdout.flush()
        self._written = safe


def _text(vocabulary, ids) -> str:
    decoded = vocabulary.decode(np.asarray(ids))
    if isinstance(decoded, bytes):
        return codecs.decode(decoded, "utf-8", "replace")
    return decoded


def _prompts(args, vocabulary) -> list[np.ndarray]:
    texts = list(args.prompt or [])
    if args.prompt_file:
        try:
            texts.append(epath.Path(args.prompt_file).read_bytes())
        except OSError as error:
            raise UserError(f"--prompt_file={args.prompt_file}: {error}") from error
    if not texts or not all(texts):
        raise UserError("--prompt is empty: pass --prompt or --prompt_file")
    prompts = [
        vocabulary.encode(text, close_line=False, where="--prompt") for text in texts
    ]
    if args.preset == "paper":
        prompts = [p[-PAPER_CONTEXT:] for p in prompts]
    return [p for p in prompts for _ in range(args.num_samples)]


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.generate", description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--prompt_file", help="a file whose text is one more prompt")
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
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    run = runs.load(args.workdir, checkpoint=args.checkpoint, params=args.params)
    model = runs.for_reading(run.model, {"memory_length": args.memory_length})
    prompts = _prompts(args, run.vocabulary)
    sys.stdout.write(_text(run.vocabulary, prompts[0]))
    tokens_RN, _ = generate(
        model,
        run.params,
        prompts,
        num_tokens=args.num_tokens,
        seed=args.seed,
        sampling=sampling,
        on_tokens=_Printer(run.vocabulary),
    )
    print()
    for row in range(1, len(prompts)):
        text = _text(run.vocabulary, [*prompts[row], *tokens_RN[row]])
        print(f"--- {row + 1} of {len(prompts)}\n{text}")
    return 0


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
