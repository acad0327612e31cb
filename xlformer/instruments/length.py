"""Time and peak memory of kinds of attention, and of an LSTM, against the length.

One forward pass over one segment, and one gradient, of a small model in float32; every
row in a process of its own, with a limit of memory and of time, so that what does not
fit is a row of the table.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from xlformer import storage
from xlformer.errors import Argument, UserError, did_you_mean
from xlformer.instruments import apart, mechanisms, passes, records
from xlformer.instruments import members as members_lib
from xlformer.instruments.instrument import Request, Result, Table
from xlformer.instruments.mechanisms import FLOOR, KINDS, SIZES, Sizes
from xlformer.instruments.passes import WAYS, Row
from xlformer.models.parameters import abstract_params, count

RUNS, SEEDS = True, {}
LONGEST = 1 << 24  # tokens
REASON = 40  # characters of why a row failed, in a table; JSON has all of them
UPPER = 3  # lengths that a slope is of, the greatest that there are
MARKS = dict(zip(KINDS, "os^vxD", strict=True))
DASHES = ("-", "--", "-.", ":")


def add_flags(parser) -> None:
    parser.add_argument("--kinds", help=f"of {','.join(KINDS)}; default: all")
    parser.add_argument("--lengths", help="in tokens; default: 1024,2048,...,16384")
    parser.add_argument(
        "--memory", type=float, default=4.0, help="GiB that a process may take"
    )
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="that a process may take"
    )


def measure(request: Request) -> Result:
    request = request.with_flags(add_flags)
    sizes, args = SIZES[request.size], request.args
    lengths = _lengths(args.lengths, sizes.lengths)
    for name in ("memory", "seconds"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(Argument(name, getattr(args, name)), " must be above 0")
    made = _models(request, sizes, lengths)
    limits = {"memory": int(args.memory * 2**30), "seconds": args.seconds}
    limits["least_seconds"] = sizes.least_seconds
    found = {
        name: _rows(request, name, of_length, sizes.together, limits)
        for name, of_length in made.items()
    }
    slopes = {name: _slopes(rows) for name, rows in found.items()}
    facts = {
        "models": {name: _about(of) for name, of in made.items()},
        "limits": limits,
        "batch_size": 1,
        "rows": {n: [dataclasses.asdict(r) for r in rows] for n, rows in found.items()},
        "slopes": slopes,
    }
    tables = [_passes_table(found, args.memory), _slopes_table(slopes)]
    notes = _notes(made, args)
    return Result(tables, facts, lambda figure: draw(figure, found, limits), notes)


# What is measured ---------------------------------------------------------------------


def _lengths(text: str | None, default: tuple[int, ...]) -> list[int]:
    if text is None:
        return list(default)
    parts = [part.strip() for part in text.split(",")]
    digits = len(str(LONGEST))
    if not all(
        part.isdecimal() and len(part) <= digits and 0 < int(part) <= LONGEST
        for part in parts
    ):
        line = f": numbers of tokens, as in 512,1024, up to {LONGEST:,}"
        raise UserError(Argument("lengths", text), line)
    found = sorted(set(map(int, parts)))
    if len(found) < 2:
        raise UserError(Argument("lengths", text), ": a slope needs two lengths")
    return found


def _models(request: Request, sizes: Sizes, lengths) -> dict[str, dict]:
    """By name, the model for each length."""
    args = request.args
    if not request.members:
        return {
            k: mechanisms.kind_models(k, sizes, lengths)
            for k in _kinds(args.kinds, sizes)
        }
    if args.kinds is not None:
        raise UserError(
            Argument("kinds", args.kinds),
            " with ",
            Argument("workdir"),
            ": one of them",
        )
    for member in request.members:
        longest = member.model.longest_segment
        if longest is not None and longest < lengths[-1]:
            raise UserError(
                Argument("workdir", member.run.workdir),
                f": the model's longest segment is {longest} tokens, ",
                Argument("lengths"),
                f" has {lengths[-1]}",
            )
    return {m.name: dict.fromkeys(lengths, m.model) for m in request.members}


def _kinds(text: str | None, sizes: Sizes) -> tuple[str, ...]:
    if text is None:
        return sizes.kinds
    found = tuple(part.strip() for part in text.split(","))
    for kind in found:
        if kind not in KINDS:
            raise UserError(Argument("kinds", text), did_you_mean(kind, KINDS))
        if found.count(kind) > 1:
            raise UserError(Argument("kinds", text), f": {kind} stands there twice")
    return found


def _rows(request, name: str, of_length: Mapping, together: bool, limits) -> list[Row]:
    """A row for each length and way; those that another call has measured are read."""
    # One model serves all lengths in one process, where its shapes depend on none.
    work = [([n], [way]) for n in of_length for way in WAYS]
    if together and len(set(of_length.values())) == 1:
        work = [(list(of_length), list(WAYS))]
    found = []
    for lengths, ways in work:
        model = of_length[lengths[-1]]
        file = f"{members_lib.file_name(name)}-{lengths[-1]}-{ways[-1]}.json"
        file = request.runs / "length" / file
        asked = {"model": repr(model), "lengths": lengths, "ways": ways, **limits}
        asked |= {"jax": jax.__version__, "together": together}
        kept = records.read(file, asked=asked)
        rows = [Row(**row) for row in kept["rows"]] if kept else None
        if rows is None:
            rows = passes.apart_rows(model, lengths, ways, **limits)
            file.parent.mkdir(parents=True, exist_ok=True)
            fields = [dataclasses.asdict(row) for row in rows]
            # What failed otherwise than by its limits is tried again.
            if all(row.why in ("", apart.MEMORY, apart.TIME) for row in rows):
                storage.put(file, json.dumps({"asked": asked, "rows": fields}))
        for row in rows:
            said = row.why or f"{row.seconds:.4f} s"
            line = f"{name}, {row.length} tokens, {row.way}: {said}"
            print(line, file=sys.stderr, flush=True)
        found += rows
    return found


# What comes of it ---------------------------------------------------------------------


def slope(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """d log(value) / d log(length), by least squares; None of fewer than two values."""
    if len(lengths) < 2:
        return None
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def curves(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """What is shown of a model, by name and length."""
    by_way = {way: {r.length: r for r in rows if r.way == way} for way in WAYS}
    forward, gradient = (
        {n: r for n, r in by_way[way].items() if not r.why} for way in WAYS
    )
    both = [n for n in gradient if n in forward]
    found = {
        "forward_s": {n: r.seconds for n, r in forward.items()},
        "backward_s": {n: gradient[n].seconds - forward[n].seconds for n in both},
        "forward_bytes": {n: r.peak_bytes for n, r in forward.items()},
        "gradient_bytes": {n: r.peak_bytes for n, r in gradient.items()},
    }
    # A difference of times that other programs disturbed may be no time at all.
    return {k: {n: x for n, x in c.items() if x and x > 0} for k, c in found.items()}


def _slopes(rows: Sequence[Row]) -> dict:
    found = {}
    for name, curve in curves(rows).items():
        upper = sorted(curve)[-UPPER:]
        found[name] = {
            "slope": slope(upper, [curve[n] for n in upper]),
            "lengths": upper,
        }
    return found


def _passes_table(found: Mapping[str, Sequence[Row]], memory: float) -> Table:
    lines = []
    for name, rows in found.items():
        shown = curves(rows)
        why = {(r.length, r.way): r.why for r in rows if r.why}
        for n in sorted({row.length for row in rows}):
            said = {way: _why(why.get((n, way), ""), memory) for way in WAYS}
            milliseconds, mebibytes = (
                [
                    said[way] or _scaled(shown[kind].get(n), unit)
                    for way, kind in zip(WAYS, kinds, strict=True)
                ]
                for kinds, unit in (
                    (("forward_s", "backward_s"), 1e3),
                    (("forward_bytes", "gradient_bytes"), 2**-20),
                )
            )
            lines.append((name, n, *milliseconds, *mebibytes))
    columns = ("", "length", "forward ms", "backward ms", "forward MiB", "both MiB")
    return Table("one segment: time, and peak of memory", columns, lines)


def _why(why: str, memory: float) -> str:
    return f"{why} at {memory:g} GiB" if why == apart.MEMORY else why[:REASON]


def _scaled(value, unit: float):
    return None if value is None else value * unit


def _slopes_table(slopes: Mapping[str, dict]) -> Table:
    lines = []
    for name, of in slopes.items():
        lengths = of["forward_s"]["lengths"], of["backward_s"]["lengths"]
        spans = [f"{min(n)}-{max(n)}" if n else None for n in lengths]
        lines.append((name, *(x["slope"] for x in of.values()), *spans))
    columns = ("", "forward s", "backward s", "forward bytes", "both bytes")
    columns += ("forward over", "backward over")
    title = f"slopes of logarithms, over the greatest lengths that fit, {UPPER} at most"
    return Table(title, columns, lines)


def _about(of_length: Mapping) -> dict:
    model = next(iter(of_length.values()))
    return {
        "parameters": count(abstract_params(model)),
        "causal": model.causal,
        **model.card(),
    }


def _notes(made: Mapping, args) -> list[str]:
    notes = [
        "backward is a gradient's time without that of a forward pass; both MiB is "
        "the peak of a gradient, beyond what lay there before",
        f"a process may take {args.memory:g} GiB and {args.seconds:g} s",
    ]
    ahead = [name for name, of in made.items() if not next(iter(of.values())).causal]
    if ahead:
        notes.append(f"{', '.join(ahead)}: sees later tokens too; the others do not")
    if FLOOR in made:
        notes.append(f"{FLOOR}: attention returns the values, a bound on speed")
    return notes


def draw(figure, found: Mapping[str, Sequence[Row]], limits: Mapping) -> None:
    """Three panels: the times of both passes, and the memory that both take."""
    panels = figure.subplots(1, 3)
    shown = ("forward_s", "backward_s", "gradient_bytes")
    labels = "forward pass (ms)", "backward pass (ms)", "peak memory of both (MiB)"
    units = 1e3, 1e3, 2**-20
    for axes, kind, label, unit in zip(panels, shown, labels, units, strict=True):
        for number, (name, rows) in enumerate(found.items()):
            curve = sorted(curves(rows)[kind].items())
            style = {"marker": MARKS.get(name, "o"), "markersize": 4}
            (line,) = axes.plot(
                [n for n, _ in curve],
                [x * unit for _, x in curve],
                linestyle=DASHES[number % len(DASHES)],
                label=name,
                **style,
            )
            if kind == shown[-1]:
                # What needs more stands, hollow, on the line of the limit.
                full = {row.length for row in rows if row.why == apart.MEMORY}
                style |= {"color": line.get_color(), "fillstyle": "none"}
                most = [limits["memory"] * unit] * len(full)
                axes.plot(sorted(full), most, linestyle="none", **style)
        axes.set(xscale="log", xlabel="length (tokens)", ylabel=label)
        # Where no row was measured there is nothing to scale.
        if any(line.get_xdata().size for line in axes.get_lines()):
            axes.set_yscale("log")
        lengths = sorted({row.length for rows in found.values() for row in rows})
        axes.set_xticks(lengths, [_thousands(n) for n in lengths], fontsize=7)
        axes.minorticks_off()
    panels[-1].axhline(limits["memory"] * 2**-20, color="gray", linewidth=0.8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")


def _thousands(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
