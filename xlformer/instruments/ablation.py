"""Transformer-XL without each of its parts, as its paper has it in tables 6 and 7.

    python -m xlformer.compare ablation --out=DIR
    python -m xlformer.compare ablation --workdir=RUN [--workdir=RUN ...] --out=DIR

Positions that are relative (the paper's), Shaw's or absolute, with a memory and without
one, trained on whole segments or on their later halves, read at several attention
lengths; then the same with the lines of the text in random order, where no dependency
is longer than a line and a memory only mends the cuts between segments. With --workdir
these runs are read so, on the validation split of their text.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from xlformer import config as config_lib
from xlformer.errors import Argument, UserError
from xlformer.instruments import ablation_tables as tables
from xlformer.instruments import attention_lengths as lengths_lib
from xlformer.instruments import library_text
from xlformer.instruments import members as members_lib
from xlformer.instruments.ablation_kinds import KINDS, SHUFFLED, Kind
from xlformer.instruments.attention_lengths import Scores
from xlformer.instruments.instrument import Request, Result
from xlformer.instruments.members import Member

RUNS = True
SEEDS = {"small": 3, "tiny": 2}
IN_ORDER, IN_DISORDER = "in order", "shuffled"


class Size(NamedTuple):
    """How large everything is; lengths in bytes."""

    kinds: Sequence[Kind]
    shuffled: Sequence[Kind]
    text: int
    scored: int  # of validation, at each attention length
    placed: int  # of validation, in segments as trained
    steps: int
    batch_size: int
    segment: int
    model: Mapping[str, Any]
    lengths: Sequence[int]


SMALL = Size(
    kinds=KINDS,
    shuffled=SHUFFLED,
    text=4_000_000,
    scored=16_384,
    placed=131_072,
    steps=600,
    batch_size=32,
    segment=32,
    model={"n_layer": 3, "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 256},
    lengths=lengths_lib.default_lengths(32),
)
TINY = Size(
    kinds=(KINDS[0], KINDS[4]),
    shuffled=(),
    text=20_000,
    scored=257,
    placed=514,
    steps=2,
    batch_size=1,
    segment=8,
    model={"n_layer": 1, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16},
    lengths=(8,),
)
SIZES = {"small": SMALL, "tiny": TINY}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths",
        type=_lengths,
        help="attention lengths to read at, such as 32,64,128; without it from three "
        "quarters of a segment of training to four segments",
    )
    parser.add_argument("--steps", type=_positive, help="of each run, not the size's")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        line = f"{text!r} is no whole number of at least 1"
        raise argparse.ArgumentTypeError(line)
    return value


def _lengths(text: str) -> list[int]:
    return sorted({_positive(part) for part in text.split(",")})


def measure(request: Request) -> Result:
    """Trains and reads all kinds, or reads what is given."""
    request = request.with_flags(add_flags)
    if request.members:
        return _given(request)
    size = SIZES[request.size]
    if request.args.steps:
        size = size._replace(steps=request.args.steps)
    asked = request.args.lengths or size.lengths
    lengths_lib.check_lengths(asked, size.scored)
    texts = _write_texts(request, size.text)
    found: dict[str, dict[Kind, Scores]] = {IN_ORDER: {}, IN_DISORDER: {}}
    facts = []
    for order, kinds in ((IN_ORDER, size.kinds), (IN_DISORDER, size.shuffled)):
        for kind in kinds:
            make = functools.partial(_config, kind, size, texts[order])
            name = f"{kind.folder}-{order.replace(' ', '_')}"
            group = [
                members_lib.trained(
                    f"{name}-{size.steps}-{seed}", make(seed), request.runs
                )
                for seed in range(1, request.seeds + 1)
            ]
            tokens, documents, _ = members_lib.text(group[0], "validation")
            found[order][kind] = lengths_lib.scores(
                group, tokens[: size.placed], documents, asked, most=size.scored
            )
            facts.append(
                {
                    **kind._asdict(),
                    "text": order,
                    "parameters": group[0].parameters,
                    "runs": [member.facts() for member in group],
                    **found[order][kind].facts(),
                }
            )
    return Result(
        tables=tables.of_kinds(found[IN_ORDER], found[IN_DISORDER]),
        facts={
            "text_bytes": size.text,
            "bytes_scored": size.scored,
            "bytes_scored_as_trained": size.placed,
            "steps": size.steps,
            "batch_size": size.batch_size,
            "segment_length": size.segment,
            "model": dict(size.model),
            "attention_lengths": list(asked),
            "seeds": request.seeds,
            "members": facts,
        },
        draw=functools.partial(
            tables.draw_kinds, found[IN_ORDER], found[IN_DISORDER], size.segment
        ),
        notes=[
            f"of {size.scored:,} bytes of validation at attention lengths, of "
            f"{size.placed:,} as trained; {request.seeds} seeds, {size.steps} steps of "
            f"{size.batch_size} x {size.segment} bytes",
            "the paper's figures are perplexities of WikiText-103 and, shuffled, lm1b",
        ],
    )


def _given(request: Request) -> Result:
    """Reads runs that were trained elsewhere."""
    members, asked = request.members, request.args.lengths
    if request.args.steps is not None:
        given = Argument("steps", request.args.steps), " with ", Argument("workdir")
        raise UserError(*given, ": what is trained already is not trained")
    members_lib.check_vocabularies(members)
    texts = {}
    for member in members:
        lengths_lib.check(member)
        tokens, documents, about = members_lib.text(member, "validation")
        texts[member.name] = tokens[: SMALL.placed], documents, about
        if asked:
            lengths_lib.check_lengths(asked, min(len(tokens), SMALL.scored))
    found, facts = {}, []
    for member in members:
        tokens, documents, about = texts[member.name]
        lengths = asked or lengths_lib.default_lengths(_segment(member))
        found[member.name] = lengths_lib.scores(
            [member], tokens, documents, lengths, most=SMALL.scored
        )
        facts.append(
            {
                **member.facts(),
                "text": {**about, "tokens_read": len(tokens)},
                **found[member.name].facts(),
            }
        )
    unit = members[0].run.vocabulary.unit
    return Result(
        tables=[tables.of_runs(members, found, unit)],
        facts={"members": facts},
        draw=functools.partial(tables.draw_runs, found, unit),
        notes=[
            f"of the first {SMALL.scored:,} tokens of validation at attention lengths, "
            f"of {SMALL.placed:,} as trained, at most"
        ],
    )


def _segment(member: Member) -> int:
    return member.run.config.train.segment_length


def _config(kind: Kind, size: Size, text: epath.Path, seed: int) -> ConfigDict:
    config = config_lib.load("quickstart")
    T = size.segment
    config.name, config.seed = kind.folder, seed
    config.model.update(size.model, **kind.model(T))
    config.data.update(corpus="text", path=str(text))
    config.data.directory = str(text.parent / "prepared")
    config.train.update(steps=size.steps, batch_size=size.batch_size, segment_length=T)
    config.train.update(half_loss=kind.half, eval_every=0, save_every=size.steps)
    config.optimizer.warmup_steps = size.steps // 10
    config.eval.update(segment_length=T, max_tokens=size.scored)
    return config


def _write_texts(request: Request, size: int) -> dict[str, epath.Path]:
    """Files with the first bytes of Python's library, and with its lines shuffled."""
    text = library_text.head(size)
    texts = {IN_ORDER: text, IN_DISORDER: library_text.shuffled(text)}
    return {
        order: request.put(f"{order.replace(' ', '_')}.txt", written)
        for order, written in texts.items()
    }
