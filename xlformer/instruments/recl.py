"""How much context each of several models makes use of, relative to the others.

RECL, the relative effective context length of Dai et al. 2019 (appendix C): contexts
grow by --step tokens until a model's perplexity, on the share --r of tokens that are
the hardest for all of them, falls by less than --threshold. A token counts as far as
its loss is below the best one of all models with the shorter context. Each context is
exact: a fresh state is fed so many tokens. Beside it ECL (Khandelwal et al. 2018), the
context with which one model is within 1 % of its perplexity with the longest one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from xlformer import command, progress, storage
from xlformer import config as config_lib
from xlformer.data import preparing
from xlformer.errors import Argument, UserError
from xlformer.fields import SPLITS
from xlformer.instruments import contexts as contexts_lib
from xlformer.instruments import gains as gains_lib
from xlformer.instruments import members as members_lib
from xlformer.instruments.contexts import Targets
from xlformer.instruments.instrument import Request, Result, Table
from xlformer.instruments.members import Member

RUNS, SEEDS = True, {}
# By default the paper's step where runs are given, and what suits the small models
# where they are our own.
GIVEN = {"step": 100, "max_context": 1000, "targets": 4096}
OWN = {
    "small": {"step": 32, "max_context": 512, "targets": 6144},
    "tiny": {"step": 4, "max_context": 16, "targets": 64},
}
SHARES = "0.1,0.5,1.0"  # the paper's r
PICTURED = 0.1  # r of its figure 3
# Two kinds of marks for each model, so that a grey picture tells them apart.
MARKS = [*zip("osD^vXP*", ["-", "--", "-.", ":"] * 2, strict=True)]


def add_flags(parser) -> None:
    where = "of given runs"
    parser.add_argument("--step", type=int, help=f"between contexts; 100 {where}")
    parser.add_argument("--max_context", type=int, help=f"the longest; 1,000 {where}")
    parser.add_argument("--targets", type=int, help=f"tokens measured; 4,096 {where}")
    parser.add_argument("--r", default=SHARES, help="shares of hard tokens")
    parser.add_argument("--threshold", type=float, default=0.01, help="of the gain")
    parser.add_argument("--split", help="of the first run's text; validation")
    parser.add_argument("--text", type=command.place, help="a file in its place")


class Plan(NamedTuple):
    """What is measured."""

    contexts: range
    shares: list[float]
    threshold: float
    targets: int
    split: str
    text: str | None


def measure(request: Request) -> Result:
    """Scores all members with all contexts, and compares."""
    request = request.with_flags(add_flags)
    plan = _plan(request)
    members = request.members or _trained(request, plan)
    members_lib.check_vocabularies(members)
    longest = [_longest(member) for member in members]
    tokens, documents, text = members_lib.text(members[0], plan.split, plan.text)
    targets = contexts_lib.spread(len(tokens), plan.targets, plan.contexts, documents)
    # In files, because they are as many numbers as targets times contexts; of two
    # contexts at a time they are read.
    with tempfile.TemporaryDirectory() as folder:
        # A disk that fills up beneath a mapped file ends the process by a signal.
        room = 4 * len(members) * len(plan.contexts) * len(targets.places_N)
        storage.check_room(folder, room, "losses", "TMPDIR names another place")
        files = []
        for k, member in enumerate(members):
            path = os.path.join(folder, f"{k}.npy")
            files.append(_losses(member, tokens, targets, plan.contexts, path))
        nats = [[float(row.mean(dtype=np.float64)) for row in file] for file in files]
        gains = gains_lib.curves(map(np.stack, zip(*files, strict=True)), plan.shares)
        del files  # Or the folder could not be removed everywhere.
    found = [
        _found(k, member, plan, longest[k], nats[k], gains)
        for k, member in enumerate(members)
    ]
    facts = {
        "contexts": list(plan.contexts),
        "r": plan.shares,
        "threshold": plan.threshold,
        **targets.facts(),
        "text": text,
        "members": found,
    }
    notes = _notes(members, targets, text)
    return Result(_tables(plan, found), facts, _picture(plan, found), notes)


def _plan(request: Request) -> Plan:
    """The flags, with defaults; UserError for what cannot be."""
    args = request.args
    sizes = dict(GIVEN if request.members else OWN[request.size])
    for name in sizes:
        value = getattr(args, name)
        sizes[name] = sizes[name] if value is None else value
        if sizes[name] < 1:
            raise UserError(Argument(name, sizes[name]), " must be at least 1")
    step, longest = sizes["step"], sizes["max_context"]
    if longest % step or longest < 2 * step:
        line = " must be a multiple of it, and at least twice"
        longest = Argument("max_context", longest)
        raise UserError(longest, " with ", Argument("step", step), f":{line}")
    if not 0 < args.threshold < 1:  # No gain is the whole perplexity.
        line = " must be above 0 and below 1"
        raise UserError(Argument("threshold", args.threshold), line)
    if args.text is not None and args.split is not None:
        given = Argument("text", args.text), " with ", Argument("split", args.split)
        raise UserError(*given, ": a file of one's own has no splits")
    split = "validation" if args.split is None else args.split
    if split not in SPLITS:
        line = f" is none of {', '.join(SPLITS)}"
        raise UserError(Argument("split", split), line)
    contexts = range(step, longest + 1, step)
    shares = _shares(args.r)
    return Plan(contexts, shares, args.threshold, sizes["targets"], split, args.text)


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        line = f": shares above 0 and at most 1, such as {SHARES}"
        raise UserError(Argument("r", text), line)
    return sorted(set(shares))


def _longest(member: Member) -> int | None:
    """The longest context that a model can be fed; None is any."""
    with members_lib.about(member):
        return contexts_lib.reader(member.model)[1]


def _losses(member: Member, tokens, targets: Targets, contexts, path) -> np.ndarray:
    """Nats of each target with each context, [C, N], in a file."""
    shape = len(contexts), len(targets.places_N)
    found_CN = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    with members_lib.about(member):
        contexts_lib.score(
            member.model,
            member.params,
            tokens,
            targets.places_N,
            contexts,
            found_CN,
            step=member.run.step,
            progress=progress.Progress(f"scoring {member.name}"),
        )
    return found_CN


def _found(k: int, member: Member, plan: Plan, longest, nats, gains) -> dict:
    """All that was found of member k, for JSON."""
    # No model makes use of more than it can be fed.
    fed = [c if longest is None else min(c, longest) for c in plan.contexts]
    is_all = longest is not None and longest <= fed[-1]
    by_share = []
    for share, curve in gains.items():
        relative = [float(gain.relative_M[k]) for gain in curve]
        recl = gains_lib.recl(fed, relative, plan.threshold)
        by_share.append(
            {
                "r": share,
                "recl": recl.context,
                "recl_or_more": recl.more and not is_all,
                "relative_gain": relative,
                "error": [float(gain.error_M[k]) for gain in curve],
                "gain_in_perplexity": [float(gain.absolute_M[k]) for gain in curve],
            }
        )
    return {
        **member.facts(),
        "longest_context": longest,
        "nats": nats,
        "ecl": gains_lib.ecl(fed, nats),
        "by_r": by_share,
    }


def _tables(plan: Plan, found: Sequence[Mapping]) -> list[Table]:
    short, long = plan.contexts[0], plan.contexts[-1]
    columns = ["model", "parameters", "sees", *(f"r={r:g}" for r in plan.shares)]
    columns += ["ECL", f"ppl at {short}", f"ppl at {long}"]
    rows = []
    for one in found:
        recls = [
            f"{x['recl']}+" if x["recl_or_more"] else x["recl"] for x in one["by_r"]
        ]
        sees = one["longest_context"] or "all"
        ppl = [float(np.exp(one["nats"][i])) for i in (0, -1)]
        rows.append([one["name"], one["parameters"], sees, *recls, one["ecl"], *ppl])
    title = f"relative effective context length, tokens, of contexts up to {long}"
    r, curves = _curves(plan, found, "gain_in_perplexity")
    steps = [f"{c} to {c + plan.contexts[0]}" for c in plan.contexts[:-1]]
    return [
        Table(title, columns, rows),
        Table(
            f"perplexity gained on the hardest tokens, r={r:g}",
            ["context", *(one["name"] for one in found)],
            [[step, *gains] for step, *gains in zip(steps, *curves, strict=True)],
        ),
    ]


def _curves(plan: Plan, found: Sequence[Mapping], name: str) -> tuple[float, list]:
    """(r, that curve of each member), of the r that pictures show."""
    r = PICTURED if PICTURED in plan.shares else plan.shares[0]
    return r, [one["by_r"][plan.shares.index(r)][name] for one in found]


def _picture(plan: Plan, found: Sequence[Mapping]):
    """Draws the gain of perplexity against the context, the paper's figure 3."""

    def draw(figure) -> None:
        axes = figure.subplots()
        r, curves = _curves(plan, found, "gain_in_perplexity")
        for k, (one, curve) in enumerate(zip(found, curves, strict=True)):
            marker, line = MARKS[k % len(MARKS)]
            marks = {"marker": marker, "linestyle": line, "markersize": 4}
            axes.plot(plan.contexts[:-1], curve, label=one["name"], **marks)
        axes.set_xlabel("context (tokens)")
        axes.set_ylabel(
            f"gain by {plan.contexts[0]} tokens more\n(perplexity, r={r:g})"
        )
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()

    return draw


def _notes(members: Sequence[Member], targets: Targets, text: Mapping) -> list[str]:
    what = "the file" if text["split"] == "text" else f"the {text['split']} split"
    notes = [
        f"{len(targets.places_N)} tokens of {what} of {text['corpus']} are measured, "
        "the same ones for all models and contexts. N+ is N or more: the gain was "
        "still above the threshold."
    ]
    names = [
        member.name for member in members if _corpus(member) != _corpus(members[0])
    ]
    if names and text["split"] != "text":
        others = ", ".join(names)
        notes.append(f"The text is that of {members[0].name}; not so of {others}.")
    return notes


def _corpus(member: Member) -> tuple:
    data = member.run.config.data
    return data.corpus, data.path


def _trained(request: Request, plan: Plan) -> list[Member]:
    """Runs of our own, of equal parameters."""
    configs = (_tiny if request.size == "tiny" else _small)(request)
    # Before anything is trained: is the text long enough?
    prepared = preparing.prepare(next(iter(configs.values())).data)
    if plan.text is None:
        tokens = len(prepared.tokens[plan.split])
        contexts_lib.spread(tokens, plan.targets, plan.contexts)
    return [
        members_lib.trained(name, config, request.runs)
        for name, config in configs.items()
    ]


def _small(request: Request) -> dict[str, ConfigDict]:
    """680,000 parameters each, segments of 64; who remembers, remembers 192 or more."""

    def config(name: str, **model: Any) -> ConfigDict:
        found = config_lib.load(name)
        found.model.update(model)
        found.data.corpus = "stdlib"
        found.train.update(steps=2000, batch_size=16, segment_length=64)
        found.train.update(eval_every=0, save_every=400)
        return found

    plain = {"dropout": 0.0, "hidden_dropout": 0.0, "input_dropout": 0.0}
    return {
        "Transformer-XL": config("quickstart", memory_length=192),
        "XL-without-memory": config("quickstart", memory_length=0),
        "LSTM": config("lstm_small", d_model=160, d_hidden=240, **plain),
        "vanilla": config("vanilla_small"),
        # In one segment it sees as many tokens as it remembers.
        "SHA-RNN": config("sha_rnn_small", memory_length=256),
        "Performer": config("performer_small", d_inner=576),
    }


def _tiny(request: Request) -> dict[str, ConfigDict]:
    """Two models that a test trains in seconds, on a text of their own."""
    words = (
        "a context is what comes before a token ; it may be long , or not so".split()
    )
    draw = np.random.default_rng(0).integers(0, len(words), 4000)
    path = request.put("words.txt", " ".join(words[i] for i in draw) + "\n")
    found = {}
    for name, like in {"Transformer-XL": "quickstart", "LSTM": "lstm_small"}.items():
        config = config_lib.load(f"{like}:debug")
        config.data.update(config_lib.default_config().data)
        config.data.update(corpus="text", path=os.fspath(path), unit="bytes")
        config.data.directory = os.fspath(path.parent / "prepared")
        config.train.update(steps=20, eval_every=0, save_every=0)
        if "scan_layers" in config.model:
            config.model.scan_layers = True  # compiles faster
        found[name] = config
    return found
