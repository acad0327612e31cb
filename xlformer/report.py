"""Writes a page on runs: python -m xlformer.report --workdir=DIR ... --out=DIR

One HTML file that opens from the disk and loads nothing, report.html, and its pictures
as PNGs beside it: how the runs were trained and evaluated, what they lose by the place
in a segment and by the length of the memory, where they attend, how much their gates
let through, how fast they were, what they write; side by side with what differs in
their configs. What a run does not have is said where it would stand.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence

from etils import epath

from xlformer import command, compiled, pictures, runs, sharding, storage
from xlformer.errors import Argument, UserError, did_you_mean
from xlformer.fields import SPLITS
from xlformer.instruments import members as members_lib
from xlformer.instruments.members import Member
from xlformer.reporting import history, insides, measured, page, results, setup
from xlformer.reporting import samples as samples_lib
from xlformer.reporting.subject import Subject
from xlformer.scoring import evaluation

__all__ = ["main", "write"]

FILE = "report.html"
# The names of all pictures that a page may have.
PICTURE = re.compile(
    "training-loss|validation-loss|learning-rate|gradient-norm|throughput|places|"
    r"memories|(attention-\d+|gates|ponder-steps|ponder-places)-\d+"
)
MOST_SAMPLES = 100  # of each run, all of which are drawn together
TOKENS = 32_768  # scored once for each length of the memory


def write(
    members: Sequence[Member | runs.Run],
    out,
    *,
    split: str | None = None,
    tokens: int = TOKENS,
    samples: int = 1,
    made_by: str = "xlformer.report.write",
    say: Callable[[str], None] = lambda line: None,
) -> epath.Path:
    """Writes the page and its pictures; returns the page's path.

    Args:
      members: runs, of `runs.load`, which reads models of one's own too.
      out: a folder, made where it is not there; its files of these names are replaced.
      split: what is scored and continued; None is validation.
      tokens: how many of it are scored, at most.
      samples: how many continuations of each run are shown.
      made_by: what the page says it was made by.
      say: is told what takes its time now.

    Raises:
      UserError: no runs, one run twice, numbers that mean nothing, no room in `out`.
    """
    if not members:
        raise UserError(Argument("workdir"), ": a report needs at least one run")
    out = storage.path(out)
    _check(out, split, tokens, samples)
    subject = Subject(_named(members), out, split, tokens, samples, say=say)
    storage.make_folder(out, "out")
    logs, scored = history.History(subject), measured.Measured(subject)
    inside = insides.Insides(subject)
    sections = [
        setup.runs(subject),
        setup.differences(subject),
        history.curves(logs),
        results.section(subject),
        measured.places(scored),
        measured.memories(scored),
        insides.attention(inside),
        insides.gates(inside),
        history.throughput(logs),
        samples_lib.section(subject),
    ]
    names = ", ".join(member.name for member in subject.members)
    plural = "s" if len(subject.members) > 1 else ""
    title = f"Report on {names}" if len(names) < 60 else "Report"
    subtitle = f"{len(subject.members)} run{plural} of xlformer"
    text = page.page(title, subtitle, sections, _about(made_by))
    storage.put(out / FILE, text)
    # Of an earlier page, perhaps of other runs.
    with storage.answering(f"{out}: old pictures cannot be removed", out):
        for path in out.glob("*.png"):
            if PICTURE.fullmatch(path.stem) and path.stem not in subject.drawn:
                path.unlink()
    return out / FILE


def _check(out: epath.Path, split, tokens: int, samples: int) -> None:
    if tokens < 2:
        raise UserError(Argument("tokens", tokens), " must be at least 2")
    if split not in (None, *SPLITS):
        raise UserError(Argument("split", split), did_you_mean(split, SPLITS))
    if not 0 <= samples <= MOST_SAMPLES:
        line = f" must be at least 0 and at most {MOST_SAMPLES}"
        raise UserError(Argument("samples", samples), line)
    pictures.check(Argument("out", out))
    storage.check_writable(out, "out")


def _named(members: Sequence[Member | runs.Run]) -> list[Member]:
    given = [m for m in members if isinstance(m, Member)]
    others = members_lib.of([m for m in members if not isinstance(m, Member)])
    return [*given, *others]


def _about(made_by: str) -> page.Html:
    found = evaluation.machine(sharding.make_mesh({"data": 1}))
    versions = ", ".join(
        f"{name} {found[name]}" for name in ("xlformer", "python", *evaluation.SOFTWARE)
    )
    return page.joined(
        [
            "Made by ",
            page.element("code", made_by),
            f" on {found['date']}, {found['device']}: {versions}.",
        ]
    )


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.report", description=__doc__)
    members_lib.add_flags(parser)
    parser.add_argument("--out", required=True, type=command.place, help="a folder")
    parser.add_argument("--split", help="train, validation (the default) or test")
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help=f"to score, at most ({TOKENS:,})"
    )
    parser.add_argument(
        "--samples", type=int, default=1, help="continuations of each run (1)"
    )
    args = parser.parse(argv)
    if not args.workdir:
        raise UserError("--workdir=DIR is missing: it names the run to report on")
    out = storage.path(args.out)
    _check(out, args.split, args.tokens, args.samples)
    compiled.keep()
    given = sys.argv[1:] if argv is None else argv
    path = write(
        members_lib.given(args),
        out,
        split=args.split,
        tokens=args.tokens,
        samples=args.samples,
        made_by=shlex.join(["python", "-m", "xlformer.report", *given]),
        say=lambda line: print(line, file=sys.stderr),
    )
    print(path)
    return 0


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
