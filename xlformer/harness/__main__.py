"""Scores tasks of lm-evaluation-harness: pip install 'xlformer[harness]'.

    python -m xlformer.harness --tasks=TASK,... --model_args workdir=DIR [FLAGS]

It is that program's command `lm_eval` with one more model, `xlformer`, which is the
default: all of its flags and commands are taken (python -m xlformer.harness run --help
lists them), such as --include_path=FOLDER for tasks of one's own, --limit,
--num_fewshot and --output_path. --batch_size says how many texts are read side by side
and changes no score; by default it is config.eval.batch_size.

--model_args NAME=VALUE,... are, beside workdir, flags of xlformer.evaluate: checkpoint,
params, segment_length, memory_length, clamp_length, same_length, stride; and
  prefix=false       does not put the end of a line before each text
  seed=0             of generated texts where a task asks for samples
  max_gen_toks=256   to generate where a task does not say
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from xlformer import command, compiled
from xlformer.errors import UserError

# The program's own commands; what begins otherwise are flags of the first.
COMMANDS = ("run", "ls", "validate")
# Where the program looks at its flags and at the files of tasks: what is wrong there it
# raises as a plain error.
OF_FLAGS = ("_cli/", "config/", "tasks/", "evaluator.py")


def _main(argv: Sequence[str] | None) -> int:
    parser = command.Parser(prog="python -m xlformer.harness", description=__doc__)
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if argv[0] in ("-h", "--help", "--version"):
        parser.parse(argv[:1])
    try:
        import lm_eval
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UserError(
            "lm-evaluation-harness is not installed, or not whole "
            f"({error}): pip install 'xlformer[harness]'"
        ) from None
    # Registers the model.
    from xlformer.harness import model as _  # noqa: F401

    compiled.keep()
    before, sys.argv = sys.argv, ["lm_eval", *_completed(argv)]
    try:
        cli_evaluate()
    except (ValueError, TypeError, KeyError) as error:
        if not _is_of_flags(error, os.path.dirname(lm_eval.__file__)):
            raise
        raise UserError(f"lm_eval: {error}") from None
    finally:
        sys.argv = before
    return 0


def _is_of_flags(error: Exception, folder: str) -> bool:
    """Whether it was raised in OF_FLAGS of this folder."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return last.filename.startswith(tuple(os.path.join(folder, p) for p in OF_FLAGS))


def _completed(argv: list[str]) -> list[str]:
    """The program's arguments, with what else would be its own defaults."""
    name, rest = (argv[0], argv[1:]) if argv[0] in COMMANDS else ("run", argv)
    given = {item.partition("=")[0] for item in rest}
    # A file of settings may have them, and --help needs none.
    if name != "run" or given & {"--config", "-C", "--help", "-h"}:
        return [name, *rest]
    if not given & {"--model", "-M"}:
        rest = ["--model=xlformer", *rest]
    if not given & {"--batch_size", "-b"}:
        rest = ["--batch_size=auto", *rest]
    return [name, *rest]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
