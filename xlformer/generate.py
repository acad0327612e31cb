"""Continues a text: python -m xlformer.generate --workdir=DIR --prompt="...".

How it is done stands in generation/continuation.py, how tokens are drawn in
generation/sampling.py. Each host of a job makes the same call; the first one prints.
"""

from __future__ import annotations

import argparse
import sys

import jax
import numpy as np

from xlformer import command, compiled, hosts, runs, sharding
from xlformer.data import local
from xlformer.errors import UserError
from xlformer.generation import interactive, sampling
from xlformer.generation.continuation import (
    MOST,
    PLAIN,
    Continuation,
    compiled_block,
    for_generation,
    generate,
)
from xlformer.generation.printing import Printer, Row
from xlformer.generation.sampling import (
    PAPER,
    PAPER_CONTEXT,
    PAPER_TOKENS,
    Sampling,
)
from xlformer.machines import cores
from xlformer.scoring.texts import read

__all__ = [
    "Continuation",
    "Sampling",
    "compiled_block",
    "for_generation",
    "generate",
    "main",
]

# Tokens of the test split that are continued where no prompt is given.
OPENING = 32


def _prompts(args, run: runs.Run) -> list[np.ndarray]:
    vocabulary = run.vocabulary
    texts = [("--prompt", text) for text in args.prompt or []]
    if args.prompt_file is not None:
        where = f"--prompt_file={args.prompt_file}"
        texts.append((where, _file(args.prompt_file, vocabulary.unit, where)))
    if not texts and not runs.names_data(run.config):
        raise UserError("nothing to continue: pass --prompt or --prompt_file")
    # Not closed: a prompt goes on where it ends, even within a line.
    prompts = [vocabulary.encode(x, close_line=False, where=w) for w, x in texts]
    for (where, _), prompt in zip(texts, prompts, strict=True):
        if not len(prompt):
            raise UserError(f"{where} is empty: at least one token is needed")
    if not texts:
        tokens, _, _ = read(run, "test", None, args.data_path)
        prompts = [np.asarray(tokens[:OPENING])]
    if args.preset == "paper":
        # The end of a prompt is what is continued.
        prompts = [p[-PAPER_CONTEXT:] for p in prompts]
    return [p for p in prompts for _ in range(args.num_samples)]


def _file(name: str, unit: str, where: str) -> bytes:
    """The text of a file or a pipe, which can be read once."""
    try:
        return local.open_text(name, unit, where).read()
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error


def _arguments(argv) -> argparse.Namespace:
    parser = command.Parser(prog="python -m xlformer.generate", description=__doc__)
    parser.add_argument("--workdir", required=True, type=command.place)
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument(
        "--prompt_file",
        type=command.place,
        help="a file whose text is one more prompt; - is standard input",
    )
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="prompts from standard input, line by line, with one memory for all",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends a row before this text; may be given several times",
    )
    parser.add_argument(
        "--data_path", help="where the run's own text lies now, continued by default"
    )
    parser.add_argument("--num_tokens", type=int, help="to generate; default: 256")
    sampling.add_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--num_samples", type=int, default=1, help="of each prompt")
    parser.add_argument(
        "--preset", choices=["paper"], help="512 context, top 40, 1,000"
    )
    parser.add_argument("--memory_length", type=int)
    parser.add_argument("--checkpoint", default="best", help=runs.CHECKPOINT_HELP)
    parser.add_argument("--params", help="raw or ema; default: ema where it is kept")
    parser.add_argument("--mesh", default="data=-1", help=sharding.MESH_HELP)
    cores.add_flag(parser)
    hosts.add_flags(parser)
    args = parser.parse(argv)
    paper = args.preset == "paper"
    if args.num_tokens is None:
        args.num_tokens = PAPER_TOKENS if paper else 256
    _check_arguments(args)
    return args


def _check_arguments(args) -> None:
    if args.num_tokens < 1 or args.num_samples < 1:
        raise UserError(
            f"--num_tokens={args.num_tokens} and --num_samples={args.num_samples} must "
            "be at least 1"
        )
    if args.num_tokens > MOST:
        raise UserError(f"--num_tokens={args.num_tokens} must be at most {MOST}")
    # A key of JAX has 32 bits of the seed: a larger one would repeat a smaller one.
    if not 0 <= args.seed < 1 << 32:
        raise UserError(f"--seed={args.seed} must be from 0 to {(1 << 32) - 1}")
    if args.memory_length is not None and args.memory_length < -1:
        raise UserError(
            f"--memory_length={args.memory_length} must not be negative "
            "(-1: the model's)"
        )
    if "" in args.stop:
        raise UserError("--stop= is empty: name the text before which a row ends")
    if not args.interactive:
        return
    for flag, refused in (
        ("--prompt_file", args.prompt_file is not None),
        ("a second --prompt", len(args.prompt or []) > 1),
        (f"--num_samples={args.num_samples}", args.num_samples > 1),
        (f"--preset={args.preset}", args.preset is not None),
    ):
        if refused:
            raise UserError(
                f"{flag} is not for --interactive, which is one text and reads its "
                "prompts from standard input"
            )


def _main(argv) -> int:
    args = _arguments(argv)
    preset = PAPER if args.preset == "paper" else PLAIN
    drawn = sampling.from_flags(args, preset)
    compiled.keep()
    with hosts.reading(args, args.workdir):
        sizes = sharding.parse_mesh(args.mesh)
        texts = len(args.prompt or []) + (args.prompt_file is not None)
        cores.prepare(
            runs.read_config(args.workdir),
            asked=args.cpu_devices,
            rows=max(1, texts) * args.num_samples,
            segment_length=1,
            sizes=sizes,
        )
        if jax.process_count() > 1:
            _check_of_several(args)
        mesh = sharding.make_mesh(sizes, where="--mesh")
        run = runs.load(
            args.workdir, checkpoint=args.checkpoint, params=args.params, mesh=mesh
        )
        model = run.model.for_reading(memory_length=args.memory_length)
        options = {"seed": args.seed, "sampling": drawn, "mesh": mesh, "step": run.step}
        if args.interactive:
            interactive.talk(
                Continuation(model, run.params, 1, **options),
                run.vocabulary,
                num_tokens=args.num_tokens,
                stops=args.stop,
                first=args.prompt[0] if args.prompt else "",
            )
        else:
            _continue(args, run, model, options)
    return 0


def _check_of_several(args) -> None:
    """Raises UserError for what reads standard input, which only the first host has."""
    for flag, refused in (
        ("--interactive", args.interactive),
        (f"--prompt_file={args.prompt_file}", args.prompt_file == "-"),
    ):
        if refused:
            raise UserError(f"{flag} reads standard input, which only one host has")


def _continue(args, run: runs.Run, model, options) -> None:
    prompts = _prompts(args, run)
    # Another host could have another file of that name, and all would wait for ever.
    if jax.process_count() > 1:
        hosts.same(prompt=repr([prompt.tolist() for prompt in prompts]))
    _say_what_is_unseen(model, prompts)
    rows = [Row(run.vocabulary, prompt, args.stop) for prompt in prompts]
    printer = Printer(rows)
    generate(
        model,
        run.params,
        prompts,
        num_tokens=args.num_tokens,
        on_tokens=printer,
        **options,
    )
    printer.finish()
    # The first row was printed as it came; rows cannot be printed side by side.
    for number, row in enumerate(rows[1:], 2):
        print(f"--- {number} of {len(rows)}\n{row.prompt}{row.text}")


def _say_what_is_unseen(model, prompts) -> None:
    sight, longest = for_generation(model).sight, max(map(len, prompts))
    if sight is not None and longest > sight and hosts.is_first():
        print(
            f"a prompt has {longest} tokens, of which the model sees the last {sight}",
            file=sys.stderr,
            flush=True,
        )


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
