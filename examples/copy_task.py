"""Digits, a separator, the same digits: learnt from short sequences, asked of long.

    python examples/copy_task.py --model=universal
    python examples/copy_task.py --model=transformer_xl --config.model.n_layer=4

The task of Dehghani et al. 2018 (arXiv:1807.03819, table 4) as one sequence. Loss and
accuracies are of what follows the separator. Lengths are random up to --length, and so
is the place of a sequence in its row (the paper's random offsets): the absolute
positions of long sequences are then known too. A sequence counts where all of its
characters are right, each given those before it: so greedy generation would have made
it. With 3,000 steps that takes minutes on two cores. More tasks, sets of several sizes
and spreads over seeds: python -m xlformer.compare tasks.
"""

import math
import sys

import jax
import numpy as np

from xlformer import command, models
from xlformer import config as config_lib
from xlformer.errors import UserError
from xlformer.fields import FREE, Rule
from xlformer.instruments import fitting, sequences
from xlformer.tables import aligned

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
    config.model.update({**fields, **SIZES.get(name, {})}, vocab_size=sequences.SYMBOLS)
    config_lib.set_fields(config, overrides)
    return models.build(config.model)


def drawn(rng, lengths, room):
    """Rows of this room, with so many digits each, and the weights of their targets."""
    pairs = [sequences.copy(rng, n) for n in lengths]
    starts = [rng.integers(room + 2 - len(q) - len(a)) for q, a in pairs]
    return sequences.rows(pairs, room, starts)


def say(step, loss):
    print(f"step {step:>6}: loss {loss:.4f}", file=sys.stderr)


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
    room = 2 * args.test_length + 1

    def batches():
        while True:
            yield drawn(rng, rng.integers(1, args.length + 1, args.rows), room)

    options = {"rate": args.rate, "steps": args.steps, "seed": args.seed, "say": say}
    params, loss = fitting.fit(model, batches(), **options)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    print(f"{args.model}, {count:,} parameters, {args.steps:,} steps: loss {loss:.4f}")
    rows = [("length", "characters", "sequences")]
    for length in (args.length, args.test_length):
        batch = drawn(rng, [length] * args.rows, room)
        found = fitting.accuracies(model, params, *batch)
        rows.append((str(length), *(f"{share:.3f}" for share in found)))
    print("\n".join(aligned(rows)))
    return 0


def main(argv=None):
    """Trains and tests; returns the exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
