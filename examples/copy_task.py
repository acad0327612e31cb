"""Digits, a separator, the same digits: learnt from short sequences, asked of long.

    python examples/copy_task.py --model=universal
    python examples/copy_task.py --model=transformer_xl --config.model.n_layer=4

The task of Dehghani et al. 2018 (arXiv:1807.03819, table 4) as one sequence. Loss and
accuracies are of what follows the separator. Lengths are random up to --length, and so
is the place of a sequence in its row (the paper's random offsets), where a reset begins
it: the absolute positions of long sequences are then known too. A sequence counts where
all of its characters are right, each given those before it: so greedy generation would
have made it. With 3,000 steps that takes minutes on two cores.
"""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xlformer import command, models
from xlformer import config as config_lib
from xlformer.errors import UserError
from xlformer.fields import FREE, Rule
from xlformer.tables import aligned

DIGITS, SEPARATOR, END, NOTHING, SYMBOLS = 10, 10, 11, 12, 13
# About 100,000 parameters each. What is not here has the sizes of its configuration,
# which --config.model.FIELD=VALUE changes.
SIZES = {
    "transformer_xl": dict(n_layer=2, d_model=64, n_head=4, d_inner=256),
    "lstm": dict(n_layer=2, d_model=64, d_hidden=96),
    "vanilla": dict(
        n_layer=2,
        d_model=60,
        n_head=4,
        d_inner=240,
        context_length=128,
        layer_losses=False,
        second_target_weight=0.0,
    ),
    "universal": dict(n_step=4, d_model=92, n_head=4, d_inner=368),
    # Its memory is what attention reads, the segment's own vectors among them.
    "sha_rnn": dict(n_layer=2, d_model=62, d_inner=248, memory_length=128),
    "performer": dict(n_layer=2, d_model=64, n_head=4, d_inner=256),
}
# A sequence is read in one segment, and begins with nothing.
ALONE = {"memory_length": 0}


def build(name, overrides=()):
    """A small model of this name, without any dropout: the digits are random enough."""
    config = config_lib.default_config(name, **SIZES.get(name, {}))
    fields = {field: 0.0 for field in config.model if "drop" in field}
    fields |= {field: value for field, value in ALONE.items() if field in config.model}
    config.model.update({**fields, **SIZES.get(name, {})}, vocab_size=SYMBOLS)
    config_lib.set_fields(config, overrides)
    return models.build(config.model)


def sequences(rng, lengths_B, room, *, anywhere):
    """A row each: what model.apply takes, and the weights of the targets.

    Args:
      lengths_B: digits of each row.
      room: of a row, in tokens.
      anywhere: whether a sequence may begin later than its row.
    """
    tokens_BN = np.full((len(lengths_B), room + 1), NOTHING, np.int32)
    resets_BT = np.zeros((len(lengths_B), room), bool)
    weights_BT = np.zeros((len(lengths_B), room), np.float32)
    ends = []
    for row, n in enumerate(lengths_B):
        size = 2 * n + 2
        start = rng.integers(0, room + 2 - size) if anywhere else 0
        digits = rng.integers(0, DIGITS, n)
        sequence = [*digits, SEPARATOR, *digits, END]
        tokens_BN[row, start : start + size] = sequence
        resets_BT[row, start] = start > 0
        # The target of input t is token t + 1: the first is the separator's.
        weights_BT[row, start + n : start + size - 1] = 1
        ends.append(start + size - 1)
    return {
        "inputs_BT": tokens_BN[:, :-1],
        "targets_BT": tokens_BN[:, 1:],
        "resets_BT": resets_BT if anywhere else None,
        "lengths_B": np.array(ends, np.int32),
    }, weights_BT


def train(model, batches, *, rate, steps, seed=0):
    """Adam with a warm-up and a cosine; returns the parameters and the last loss."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    key = jax.random.key(seed)

    def loss(params, batch, weights_BT, step):
        state = model.init_state(len(weights_BT))
        rngs = {"dropout": jax.random.fold_in(key, step)}
        nll_BT, _, aux = model.apply(
            params, **batch, state=state, step=step, train=True, rngs=rngs
        )
        # What a model adds, such as the price of pondering, comes on top.
        return (nll_BT * weights_BT).sum() / weights_BT.sum() + aux.loss

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, moments, batch, weights_BT, step):
        value, grads = jax.value_and_grad(loss)(params, batch, weights_BT, step)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    params = jax.jit(model.init)(key)
    moments = jax.jit(optimizer.init)(params)
    for step in range(steps):
        batch, weights_BT = next(batches)
        params, moments, value = update(params, moments, batch, weights_BT, step)
        if step % max(1, steps // 10) == 0:
            print(f"step {step:>6}: loss {value:.4f}", file=sys.stderr)
    return params, float(value)


@functools.partial(jax.jit, static_argnums=0)
def right(model, params, batch):
    """Whether each target is the likeliest symbol, [B, T]."""
    targets_BT = batch["targets_BT"]
    given = {name: x for name, x in batch.items() if name != "targets_BT"}
    state = model.init_state(len(targets_BT))
    log_probs_BTV, _ = model.log_probs(params, **given, state=state)
    return jnp.argmax(log_probs_BTV, axis=-1) == targets_BT


def accuracies(model, params, batch, weights_BT):
    """Of characters, and of whole sequences."""
    scored_BT = weights_BT > 0
    right_BT = np.asarray(right(model, params, batch))
    return right_BT[scored_BT].mean(), (right_BT | ~scored_BT).all(axis=1).mean()


def check(args):
    """Raises UserError for what cannot be drawn or trained."""
    for name, least in {"length": 1, "steps": 1, "rows": 1, "seed": 0}.items():
        Rule(FREE, least=least).check(f"--{name}", getattr(args, name))
    Rule(FREE, above=0).check("--rate", args.rate)
    if args.test_length < args.length:
        raise UserError(
            f"--test_length={args.test_length} is less than --length={args.length}: "
            "rows have room for sequences of the test"
        )


def _main(argv):
    parser = command.Parser(prog="copy_task.py", description=__doc__)
    parser.add_argument("--model", default="universal", choices=list(models.MODELS))
    parser.add_argument("--length", type=int, default=10, help="longest in training")
    parser.add_argument("--test_length", type=int, default=40)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args, overrides = parser.parse_with_overrides(argv)
    check(args)
    model, rng = build(args.model, overrides), np.random.default_rng(args.seed)
    room, anywhere = 2 * args.test_length + 1, model.resets_in_segment

    def drawn(lengths_B):
        return sequences(rng, lengths_B, room, anywhere=anywhere)

    def batches():
        while True:
            yield drawn(rng.integers(1, args.length + 1, args.rows))

    options = {"rate": args.rate, "steps": args.steps, "seed": args.seed}
    params, loss = train(model, batches(), **options)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    print(f"{args.model}, {count:,} parameters, {args.steps:,} steps: loss {loss:.4f}")
    rows = [("length", "characters", "sequences")]
    for length in (args.length, args.test_length):
        found = accuracies(model, params, *drawn([length] * args.rows))
        rows.append((str(length), *(f"{share:.3f}" for share in found)))
    print("\n".join(aligned(rows)))
    return 0


def main(argv=None):
    """Trains and tests; returns the exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
