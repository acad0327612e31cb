"""Which runs there are, and what tells them apart."""

from __future__ import annotations

import json

from xlformer import config as config_lib
from xlformer.errors import UserError
from xlformer.reporting.page import Folded, Rows, Section, Text, clean
from xlformer.reporting.subject import Subject, carries

# Where a run lay and was called says nothing about what it is.
_PLACES = ("name", "data.directory", "data.path")


def runs(subject: Subject) -> Section:
    """A column for each run, and which of their numbers compare."""
    columns = [_facts(subject, member) for member in subject.members]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name) for column in columns)] for name in names]
    head = ["", *(member.name for member in subject.members)]
    table = Rows("The runs, and the checkpoints that were read", head, rows)
    return Section("runs", "Runs", [*_comparable(subject), table])


def weights(run) -> dict:
    """Which parameters of a run were read."""
    steps = {"mean of steps": ", ".join(map(str, run.mean_of))} if run.mean_of else {}
    return {
        "step": run.step,
        **steps,
        "weights": "average (ema)" if run.averaged else "raw",
    }


def _facts(subject: Subject, member) -> dict:
    run, vocabulary = member.run, member.run.vocabulary
    train = run.config.train
    facts = {
        "model": run.config.own_model or run.config.model.name,
        "parameters": member.parameters,
        **weights(run),
        "tokens read": run.step * train.batch_size * train.segment_length,
        "batch × segment": f"{train.batch_size} × {train.segment_length}",
        "carries": carries(run.model),
        "vocabulary": f"{vocabulary.size:,} {vocabulary.unit}",
        "work directory": clean(run.workdir),
    }
    try:
        _, _, text = subject.text(member)
        facts["corpus"] = clean(text["corpus"])
        facts["checksum of the text"] = clean(text["payload_sha256"])[:12]
    except UserError:
        facts["corpus"] = "not here"
    return facts


def _comparable(subject: Subject) -> list[Text]:
    """Warnings where numbers of different runs mean different things."""
    first, *others = subject.members
    if not others:
        return []
    found = []
    one = first.run.vocabulary
    if any(
        (m.run.vocabulary.kind, m.run.vocabulary.symbols) != (one.kind, one.symbols)
        or m.run.vocabulary.options() != one.options()
        for m in others
    ):
        found.append(
            "These runs have different vocabularies: a loss per token, a perplexity "
            "or a place counted in tokens is another quantity for each of them, and "
            "does not compare. Bits per byte compare where the text is the same."
        )
    sums = set()
    for member in subject.members:
        try:
            sums.add(str(subject.text(member)[2]["payload_sha256"]))
        except UserError:
            sums.add(member.name)
    if len(sums) > 1:
        found.append(
            "These runs were not scored on one and the same text (the checksums "
            "differ, or a text is not here): no loss of one compares with another's."
        )
    return [Text(text, "warning") for text in found]


def differences(subject: Subject) -> Section:
    """The options in which the runs' configs differ, and those that are the same."""
    configs = [config_lib.flat(member.run.config) for member in subject.members]
    fields = dict.fromkeys(name for config in configs for name in config)
    differing, partly, same = [], [], []
    for name in fields:
        if name in _PLACES:
            continue
        values = [
            _value(config[name]) if name in config else None for config in configs
        ]
        if None in values:
            partly.append([clean(name), *values])
        elif len(set(map(repr, values))) > 1:
            differing.append([clean(name), *values])
        else:
            same.append([clean(name), values[0]])
    head = ["option", *(member.name for member in subject.members)]
    blocks = []
    if len(configs) > 1 and differing:
        blocks.append(Rows("Options in which the configs differ", head, differing))
    elif len(configs) > 1 and not partly:
        blocks.append(Text("The configs differ in nothing but names and places."))
    if partly:
        title = f"Options that only some of these models have ({len(partly)})"
        caption = "– is an option that a model of that kind does not have"
        blocks.append(Folded(title, [Rows(caption, head, partly)]))
    title = "All options" if len(configs) == 1 else "Options that are the same in all"
    table = Rows("As the checkpoints were trained", ["option", "value"], same)
    blocks.append(Folded(f"{title} ({len(same)})", [table]))
    return Section("config", "Config", blocks)


def _value(value):
    """A number or a text; whatever else a config holds, as JSON."""
    if isinstance(value, float):
        return f"{value:g}"  # As it was typed, not as what was measured is shown.
    if isinstance(value, int | str):
        return value
    return clean(json.dumps(value, default=str))
