"""What goes on inside of models: attention by distance, gates, adaptive computation.

Only what a model says of itself is shown (`Model.inspect`), of a few segments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from xlformer import models
from xlformer.errors import UserError
from xlformer.kernels.watching import Inside
from xlformer.reporting.charts import Line, Panel
from xlformer.reporting.page import Heading, Rows, Section, Text
from xlformer.reporting.subject import Subject, ends, memory, of_each

ROWS, SEGMENTS = 2, 4  # places of the text, and segments that are looked at in each
# Pairs of a query and a key of one row; times rows and heads they are numbers that lie
# in memory at once, 270 MB in float32 of 16 heads.
MOST_PAIRS = 1 << 21
MOST_READ = 1 << 13  # tokens of a row that fill the memory before
MOST_LAYERS = 12  # that are drawn, of a model
EXACT = 16  # distances up to here stand by themselves; from there on bins grow


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was found in the segments of a run, summed over them.

    Attributes:
      inside: Inside, with numpy arrays; halting as counts of positions [N, T].
      segment, segments, memory: tokens of a segment, how many of them, and how many
        tokens each row had read before.
    """

    inside: Inside
    segment: int
    segments: int
    memory: int

    def how(self) -> str:
        before = f" after {self.memory:,} tokens" if self.memory else ""
        return f"{self.segments} segments of {self.segment:,} tokens{before}"


class Insides:
    """All runs, looked into once."""

    def __init__(self, subject: Subject):
        self.subject = subject
        subject.say("looking at attention and gates")
        look = functools.partial(_look, subject)
        self.found, self.missing = of_each(subject, look)


def _look(subject: Subject, member) -> Seen:
    model, run = member.model, member.run
    tokens, documents, _ = subject.text(member)
    T = _segment(model, run.config.train.segment_length)
    length = memory(model)
    # A state has no length; some segments are better than none.
    reach = 4 * T if length is None else min(length, MOST_READ)
    before = -(-reach // T)
    count = (before + SEGMENTS) * T
    if len(tokens) < count + 1:
        raise UserError(
            f"its text of {len(tokens)} tokens is too short to look at {SEGMENTS} "
            f"segments of {T} with a full memory"
        )
    starts = np.linspace(0, len(tokens) - count, ROWS).astype(int)
    index_BN = starts[:, None] + np.arange(count)
    inputs_BN = np.asarray(tokens[index_BN], np.int32)
    # As in training and scoring nothing is seen from one document in the next.
    resets_BN = None if documents is None else np.isin(index_BN, documents)
    read, look = _programs(model, run.params, run.step)
    state = model.init_state(ROWS)
    found = None
    for k in range(before + SEGMENTS):
        part_BT, *resets = (
            x[:, k * T : (k + 1) * T] for x in (inputs_BN, resets_BN) if x is not None
        )
        if k < before:
            state = read(part_BT, state, *resets)
            continue
        try:
            told = look(part_BT, state, *resets)
        except jax.errors.UnexpectedTracerError:
            line = f"{type(model).__name__} loops over its layers with a loop of JAX's"
            raise UserError(f"{line}, out of which it can tell nothing") from None
        if told is None:
            name = type(model).__name__
            raise UserError(f"{name} tells nothing of what goes on inside of it")
        one, state = told
        one = jax.tree.map(lambda x: np.asarray(x, np.float64), one)
        found = one if found is None else jax.tree.map(np.add, found, one)
    return Seen(found, T, ROWS * SEGMENTS, before * T)


def _segment(model: models.Model, wanted: int) -> int:
    """Tokens of a segment: as in training, if these are not too many pairs."""
    T = min(wanted, model.longest_segment or wanted)
    # A query sees its segment and the memory.
    while T > 1 and T * (T + (memory(model) or 0)) > MOST_PAIRS:
        T //= 2
    return T


def _programs(model: models.Model, params, step: int):
    """(read, look): compiled functions of a segment, a state, and perhaps resets."""

    def read(params, part_BT, state, resets_BT=None):
        options = {"resets_BT": resets_BT, "step": step}
        return model.apply(params, part_BT, part_BT, state, **options)[1]

    def look(params, part_BT, state, resets_BT=None):
        options = {} if resets_BT is None else {"resets_BT": resets_BT}
        told = model.inspect(params, part_BT, state, step=step, **options)
        if told is None:
            return None
        inside, state = told
        # Rows are summed here: positions by steps are few numbers.
        running = {
            name: one.running_BT.sum(0).astype(jnp.float32)
            for name, one in inside.halting.items()
        }
        return inside._replace(halting=running), state

    # A dtype that no segment changes: what `apply` returns.
    return tuple(functools.partial(jax.jit(f), params) for f in (read, look))


# Sections -----------------------------------------------------------------------------


def attention(insides: Insides) -> Section:
    """How much weight each head gives to what lies how far back."""
    blocks = []
    for series, member in enumerate(insides.subject.members):
        seen = insides.found.get(member.name)
        if seen is None:
            continue
        layers = seen.inside.attention
        if not layers:
            text = f"{member.name}: nothing in it weighs positions by attention."
            blocks.append(Text(text, "missing"))
            continue
        blocks.append(Heading(member.name))
        chosen = _some(layers)
        panels = [
            _by_distance(f"attention-{series + 1}-{number + 1}", name, layers[name])
            for number, name in enumerate(chosen)
        ]
        fewer = ""
        if len(chosen) < len(layers):
            fewer = f" {len(chosen)} of {len(layers)} layers are drawn."
        ahead = "" if member.model.causal else " Distances ahead and back are one."
        if seen.inside.halting:
            ahead += " Positions that have halted count in the steps after, too."
        caption = (
            f"{member.name}: mean weight of attention by distance, of all queries that "
            f"see as far, over {seen.how()}; a line a head. From distance {EXACT} on a "
            f"point is the mean of several distances; even attention over n positions "
            f"is 1/n.{fewer}{ahead}"
        )
        blocks += insides.subject.draw(panels, caption)
        blocks.append(_mean_distances(member.name, layers))
    return Section("attention", "Attention by distance", [*blocks, *insides.missing])


def _some(layers: Mapping) -> list[str]:
    names = list(layers)
    if len(names) <= MOST_LAYERS:
        return names
    at = np.linspace(0, len(names) - 1, MOST_LAYERS).round().astype(int)
    return [names[i] for i in at]


def _by_distance(name: str, title: str, one) -> Panel:
    heads = len(one.weight_HS)
    lines = []
    for head, weight_S in enumerate(one.weight_HS):
        distance, mean = binned(weight_S, one.seen_S)
        label = f"head {head + 1}" if 1 < heads <= 8 else ""
        lines.append(Line(label, distance, mean, head, thin=heads > 8))
    if heads > 8:
        distance, mean = binned(one.weight_HS.mean(0), one.seen_S)
        lines.append(Line("mean of the heads", distance, mean, 0))
    says = f"Mean attention weight by distance in {title}: {ends(lines, 'distance')}"
    options = {"log_x": True, "log_y": True}
    return Panel(
        name, _capital(title), says, "distance, tokens", "weight", lines, **options
    )


def binned(weight_S, seen_S) -> tuple[np.ndarray, np.ndarray]:
    """(distances, mean weights): of single distances at first, then of bins that grow.

    What nobody sees has no mean, and a weight of 0 no place on an axis of powers.
    """
    S = len(seen_S)
    edges = [*range(min(S, EXACT) + 1)]
    while edges[-1] < S:
        edges.append(min(S, max(edges[-1] + 1, round(edges[-1] * 1.2))))
    edges = np.array(edges)
    weight, seen = (np.add.reduceat(x, edges[:-1]) for x in (weight_S, seen_S))
    middle = (edges[:-1] + edges[1:] - 1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = weight / seen
    keep = (seen > 0) & (mean > 0)
    return middle[keep], mean[keep]


def _mean_distances(name: str, layers: Mapping) -> Rows:
    heads = max(len(one.weight_HS) for one in layers.values())
    rows = []
    for layer, one in layers.items():
        distance_S = np.arange(one.weight_HS.shape[1])
        mean_H = (one.weight_HS @ distance_S) / one.weight_HS.sum(1)
        mean = [float(x) for x in mean_H]
        rows.append([layer, *mean, *[None] * (heads - len(mean))])
    caption = f"{name}: how far back each head looks on average, in tokens"
    return Rows(caption, ["", *(f"head {h + 1}" for h in range(heads))], rows)


def gates(insides: Insides) -> Section:
    """How open gates are, and how many steps positions take."""
    blocks = []
    for series, member in enumerate(insides.subject.members):
        seen = insides.found.get(member.name)
        if seen is None:
            continue
        if not seen.inside.gates and not seen.inside.halting:
            text = f"{member.name} has no gates on its residuals, and always takes all "
            blocks.append(Text(f"{text}its steps.", "missing"))
            continue
        blocks.append(Heading(member.name))
        if seen.inside.gates:
            blocks += _gates(insides.subject, series, member.name, seen)
        if seen.inside.halting:
            blocks += _halting(insides.subject, series, member.name, seen)
    title = "Gates and adaptive computation"
    return Section("gates", title, [*blocks, *insides.missing])


def _gates(subject: Subject, series: int, name: str, seen: Seen) -> list:
    parts = seen.segments // ROWS  # Gates are means of each segment.
    rows, lines = [], []
    for gate, one in seen.inside.gates.items():
        units_E = np.sort(one.units_E / parts)
        values = [one.mean / parts, *np.quantile(units_E, [0.1, 0.5, 0.9])]
        rows.append([gate.replace("_", " "), *(f"{value:.3f}" for value in values)])
        share = np.linspace(0, 100, len(units_E))
        lines.append(Line(gate.replace("_", " "), share, units_E))
    caption = (
        f"{name}: z of each gate, (1 − z) x + z h: 0 is the identity, 1 takes nothing "
        f"but the new. Means over {seen.how()}; quantiles are of its units' means"
    )
    head = ["gate", "mean", "10 % of units", "half", "90 % of units"]
    says = f"Openness of the units of each gate: {ends(lines, 'share')}"
    title, x = "Units of each gate, in order", "share of units, %"
    panel = Panel(f"gates-{series + 1}", title, says, x, "mean z", lines)
    picture = subject.draw([panel], f"{name}: the units of each gate by their mean z.")
    return [Rows(caption, head, rows), *picture]


def _halting(subject: Subject, series: int, name: str, seen: Seen) -> list:
    running_NT = np.stack([*seen.inside.halting.values()]) / seen.segments
    steps = np.arange(1, len(running_NT) + 1)
    updates_T = running_NT.sum(0)
    by_step = [Line("", steps, 100 * running_NT.mean(1), series)]
    by_place = [Line("", np.arange(len(updates_T)), updates_T, series)]
    panels = [
        Panel(
            f"ponder-steps-{series + 1}",
            "Positions that take a step",
            f"Share of positions by step: {ends(by_step, 'step')}",
            "step",
            "positions, %",
            by_step,
            y_from_zero=True,
        ),
        Panel(
            f"ponder-places-{series + 1}",
            "Steps by position",
            f"Mean steps by position in the segment: {ends(by_place, 'position')}",
            "position in the segment",
            "steps, mean",
            by_place,
            y_from_zero=True,
        ),
    ]
    caption = (
        f"{name}: adaptive computation, at most {len(running_NT)} steps; "
        f"{updates_T.mean():.2f} on average, over {seen.how()}."
    )
    return subject.draw(panels, caption)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
