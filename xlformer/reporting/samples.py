"""What runs write: continuations of the text that they are scored on."""

from __future__ import annotations

import numpy as np

from xlformer.generation.continuation import generate
from xlformer.generation.printing import Row
from xlformer.generation.sampling import PAPER
from xlformer.reporting.page import Heading, Sample, Section, Text
from xlformer.reporting.subject import Subject, of_each


def section(subject: Subject) -> Section:
    """The same places of the text, continued by each run."""
    if not subject.samples:
        return Section("samples", "Samples", [Text("None were asked for.", "missing")])
    found, missing = of_each(subject, lambda member: _written(subject, member))
    split = subject.split or "validation"
    blocks: list = [
        Text(
            f"Each run goes on from {subject.context} tokens of {split}, which are "
            f"grey, by {subject.length}: drawn among the {PAPER.top_k} most "
            f"probable, temperature {PAPER.temperature}, seed {subject.seed}; the "
            "first that came, none chosen."
        )
    ]
    for number in range(subject.samples):
        blocks.append(Heading(f"Sample {number + 1}"))
        for name, rows in found.items():
            blocks.append(Sample(name, rows[number].prompt, rows[number].text))
    return Section("samples", "Samples", [*(blocks if found else []), *missing])


def _written(subject: Subject, member) -> list[Row]:
    subject.say(f"{member.name} writes")
    tokens, _, _ = subject.text(member)
    # At least one token is needed, and none may lie beyond the end.
    context = max(1, min(subject.context, len(tokens) // (subject.samples + 1)))
    ends = [
        max(context, len(tokens) * (i + 1) // (subject.samples + 1))
        for i in range(subject.samples)
    ]
    prompts = [np.asarray(tokens[end - context : end]) for end in ends]
    found_RN, _ = generate(
        member.model,
        member.params,
        prompts,
        num_tokens=subject.length,
        seed=subject.seed,
        sampling=PAPER,
        step=member.run.step,
    )
    rows = [Row(member.run.vocabulary, prompt) for prompt in prompts]
    for row, ids in zip(rows, found_RN, strict=True):
        row.add(ids)
        row.finish()
    return rows
