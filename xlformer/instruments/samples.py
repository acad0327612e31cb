"""Long articles as the Transformer-XL paper made them, and how they repeat themselves.

    python -m xlformer.compare samples --workdir=DIR [...] --out=DIR [--num_tokens=500]

The first 512 tokens of the test split are continued by 1,000, each drawn among the 40
likeliest (Dai et al. 2019, arXiv:1901.02860, appendix E); then the 512 after what came
next in truth, and once more: the first three, none of them picked. The texts lie in
--out/samples, with the corpus's own continuations. Tables say how much each one repeats
itself, counted in words, over as many as the shortest text of a run has. Without
--workdir a small model of the bytes of Python's library is trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from xlformer import config as config_lib
from xlformer import models, runs, storage
from xlformer.data import preparing
from xlformer.errors import Argument, UserError
from xlformer.generation.continuation import MOST, for_generation, generate
from xlformer.generation.printing import decoded
from xlformer.generation.sampling import PAPER, PAPER_CONTEXT, PAPER_TOKENS
from xlformer.instruments import members as members_lib
from xlformer.instruments import repetition
from xlformer.instruments.instrument import Request, Result, Table
from xlformer.instruments.members import Member

RUNS = True
SEEDS: Mapping[str, int] = {}
ARTICLES = 3  # The paper shows the first three.
TINY_CONTEXT, TINY_TOKENS = 24, 72
# Of the run that is trained here, over bytes: 1,000 are no more than 100 words.
BYTES = 4000
OWN = "the corpus"
# What is measured, by the heads of the tables; most are shares.
RATES = {
    "distinct-1": lambda words, context: repetition.distinct(words, 1),
    "distinct-2": lambda words, context: repetition.distinct(words, 2),
    "distinct-3": lambda words, context: repetition.distinct(words, 3),
    "distinct-4": lambda words, context: repetition.distinct(words, 4),
    "4-grams seen": lambda words, context: _rest(repetition.distinct(words, 4)),
    "of the context": lambda words, context: repetition.shared(words, context, 4),
    "in loops": lambda words, context: repetition.looped(words),
    "longest repeat": lambda words, context: repetition.longest_repeat(words),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, help="tokens that are continued; 512")
    parser.add_argument(
        "--num_tokens", type=int, help="of each article; 1000, of the own run 4000"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; 0")


def measure(request: Request) -> Result:
    """Continues three contexts with each run; see the module."""
    asked = _Asked.of(request.with_flags(add_flags))
    for member in request.members:
        _check(member)
    members = list(request.members) or [_trained(request, asked)]
    # All texts are read before the first one is continued, which takes long.
    windows = [_windows(member, asked) for member in members]
    articles = []
    for member, found in zip(members, windows, strict=True):
        articles += _articles(member, found, asked)
    _write(request, articles)
    return _result(request, members, articles, asked)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Tokens that are continued, by how many, and the seed of what is drawn."""

    context: int
    num_tokens: int
    seed: int

    @classmethod
    def of(cls, request: Request) -> _Asked:
        """What the flags say, and else the size; UserError for what cannot be."""
        tiny = request.size == "tiny" and not request.members
        many = PAPER_TOKENS if request.members else BYTES
        defaults = {
            "context": TINY_CONTEXT if tiny else PAPER_CONTEXT,
            "num_tokens": TINY_TOKENS if tiny else many,
            "seed": 0,
        }
        given = {name: getattr(request.args, name) for name in defaults}
        found = {k: defaults[k] if v is None else v for k, v in given.items()}
        for name, least in {"context": 1, "num_tokens": 1, "seed": 0}.items():
            # A key of JAX has 32 bits of a seed: a larger one would repeat another.
            most = (1 << 32) - 1 if name == "seed" else MOST
            if not least <= found[name] <= most:
                line = f" must be at least {least} and at most {most}"
                raise UserError(Argument(name, found[name]), line)
        return cls(**found)

    @property
    def size(self) -> int:
        """Tokens of an article."""
        return self.context + self.num_tokens

    def check(self, tokens) -> None:
        """Raises UserError where a test split has no room for the articles."""
        if len(tokens) < ARTICLES * self.size:
            raise UserError(
                f"the test split has {len(tokens):,} tokens; {ARTICLES} times ",
                Argument("context", self.context),
                " and ",
                Argument("num_tokens", self.num_tokens),
                f" need {ARTICLES * self.size:,}",
            )


def _check(member: Member) -> None:
    """Raises UserError for a run that cannot be asked."""
    where = Argument("workdir", member.run.workdir)
    if not runs.names_data(member.run.config):
        raise UserError(where, " names no data, whose test split would be continued")
    with members_lib.about(member):
        for_generation(member.model)


def _trained(request: Request, asked: _Asked) -> Member:
    tiny = request.size == "tiny"
    config = config_lib.load("quickstart:debug" if tiny else "quickstart")
    if tiny:
        config.train.update(steps=2, eval_every=0, save_every=0)
        config.eval.max_tokens = 64
    # Before minutes of training: is there so much to continue?
    asked.check(preparing.prepare(config.data).tokens["test"])
    return members_lib.trained("quickstart", config, request.runs)


def _windows(member: Member, asked: _Asked) -> list[np.ndarray]:
    """Contexts, each with what follows it: the first ones of the test split."""
    tokens, _, _ = members_lib.text(member, "test")
    with members_lib.about(member):
        asked.check(tokens)
    size = asked.size
    return [np.asarray(tokens[i * size : (i + 1) * size]) for i in range(ARTICLES)]


@dataclasses.dataclass(frozen=True)
class Article:
    """A context, how one member goes on, and how the corpus does: as texts."""

    member: str
    number: int
    context: str
    drawn: str
    own: str


def _articles(member: Member, windows, asked: _Asked) -> list[Article]:
    run, name, context = member.run, member.name, asked.context
    tokens_RN, _ = generate(
        run.model,
        run.params,
        [window[:context] for window in windows],
        num_tokens=asked.num_tokens,
        seed=asked.seed,
        sampling=PAPER,
        step=run.step,
    )
    found = []
    for number, (window, drawn_N) in enumerate(zip(windows, tokens_RN, strict=True), 1):
        whole = [*window[:context], *drawn_N]
        # Decoded with its context: a space between two words belongs to neither.
        before = decoded(run.vocabulary, window[:context])
        drawn, own = (
            decoded(run.vocabulary, x)[len(before) :] for x in (whole, window)
        )
        found.append(Article(name, number, before, drawn, own))
    return found


def _write(request: Request, articles: Sequence[Article]) -> None:
    folder = request.out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for article in articles:
        name = members_lib.file_name(article.member)
        text = "\n\n".join(
            [
                f"===== context {article.number}",
                article.context,
                f"===== {article.member} goes on",
                article.drawn,
                f"===== {OWN} goes on",
                article.own,
            ]
        )
        storage.put(folder / f"{name}-{article.number}.txt", text + "\n")


# What is measured ---------------------------------------------------------------------


def rates(words: Sequence[str], context: Sequence[str]) -> dict[str, float | None]:
    """All that is said of one text."""
    return {name: rate(words, context) for name, rate in RATES.items()}


def _rest(share: float | None) -> float | None:
    return None if share is None else 1 - share


def _result(request, members, articles: Sequence[Article], asked: _Asked) -> Result:
    found = []
    for member in members:
        mine = [article for article in articles if article.member == member.name]
        texts = [text.split() for a in mine for text in (a.drawn, a.own)]
        least = min(map(len, texts))
        for article in mine:
            before = article.context.split()
            for who, text in ((article.member, article.drawn), (OWN, article.own)):
                words = text.split()
                about = {"run": member.name, "text": who, "article": article.number}
                about |= {"words": len(words), "counted": least}
                found.append({**about, **rates(words[:least], before)})
    heads = ("words", "counted", *RATES)
    many = f"{asked.num_tokens:,} tokens after {asked.context:,}"
    tables = [
        Table(
            f"{ARTICLES} articles, {many}: means over the first words of each",
            ("run", "text", *heads),
            _means(found, heads),
            left=2,
        ),
        Table(
            "each article",
            ("run", "text", "article", *heads),
            [tuple(one.values()) for one in found],
            left=2,
        ),
    ]
    facts = {
        **dataclasses.asdict(asked),
        "sampling": dataclasses.asdict(PAPER),
        "split": "test",
        "members": [_facts(member) for member in members],
        "articles": found,
        "texts": [dataclasses.asdict(article) for article in articles],
    }
    draw = functools.partial(_draw, rows=_means(found, tuple(RATES)))
    return Result(tables, facts, draw, [f"the texts: {request.out / 'samples'}"])


def _facts(member: Member) -> dict:
    model: models.Model = for_generation(member.model)
    return {
        **member.facts(),
        "unit": member.run.vocabulary.unit,
        "sight": model.sight,
        "memory_length": model.memory_length,
    }


def _means(found: Sequence[dict], names: Sequence[str]) -> list[tuple]:
    """A row for each run's articles, and one for how its corpus goes on."""
    rows: dict[tuple, list[dict]] = {}
    for one in found:
        rows.setdefault((one["run"], one["text"]), []).append(one)
    return [
        (*key, *(_mean([each[name] for each in several]) for name in names))
        for key, several in rows.items()
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return float(statistics.mean(known)) if known else None


def _draw(figure, *, rows) -> None:
    """Shares as bars, and the longest repeats beside them."""
    shares, (longest,) = list(RATES)[:-1], list(RATES)[-1:]
    left, right = figure.subplots(1, 2, width_ratios=(7, 1.3))
    width = 0.8 / len(rows)
    for number, (run, text, *values) in enumerate(rows):
        label = text if text != OWN else f"{OWN} of {run}"
        style = {
            "width": width,
            "color": "0.85" if text == OWN else f"C{number}",
            "hatch": ("//", "", "..", "xx", "\\\\", "++")[number % 6],
            "edgecolor": "black",
            "linewidth": 0.6,
        }
        at = np.arange(len(shares)) + number * width
        left.bar(at, [x or 0 for x in values[:-1]], label=label, **style)
        right.bar(number * width, values[-1], **style)
    left.set_xticks(np.arange(len(shares)) + 0.4 - width / 2, shares, rotation=20)
    left.set(ylabel="share", ylim=(0, 1.25), yticks=np.arange(6) / 5)
    left.legend(fontsize=8, ncols=2, loc="upper center")
    right.set_xticks([0.4 - width / 2], [longest])
    right.set(ylabel="words")
