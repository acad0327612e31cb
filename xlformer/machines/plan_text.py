"""A plan as text, for people."""

from __future__ import annotations

import math

from xlformer.tables import aligned, binary_size


def render(found: dict, *, parameters: bool = False) -> str:
    """What planning.plan found, one line for each kind of cost.

    parameters: also how each of their arrays is split.
    """
    shape = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    how = f"arithmetic, nothing compiled: {found['note']}"
    if not found["note"]:
        how = f"compiled in {found.get('compile_seconds', 0):.0f} s"
    title = f"{found['config']} on {found['topology']}: mesh {shape}; {how}"
    lines = [("memory", _memory(found)), ("split", _split(found))]
    lines += [("change", advice) for advice in found["advice"]]
    lines.append(("FLOPs", _flops(found["flops"])))
    if "compiler" in found:
        lines.append(("compiler", _compiler(found["compiler"])))
    lines += [
        (
            "traffic",
            f"{one['count']} {kind}: {binary_size(one['size'])}, "
            f"{binary_size(one['sent'])} sent by each device",
        )
        for kind, one in found.get("collectives", {}).items()
    ]
    lines.append(("least sent", _least(found["least_sent"])))
    table = aligned(lines + _time(found), left=2)
    return "\n".join([title, *table, *(_parameters(found) if parameters else ())])


def _split(found: dict) -> str:
    arrays = found["parameters"]
    split = [x for x in arrays if any(x["over"])]
    numbers = sum(math.prod(x["shape"]) for x in split)
    of = sum(math.prod(x["shape"]) for x in arrays)
    return (
        f"{len(split)} of {len(arrays)} arrays of the parameters, "
        f"{numbers / max(of, 1):.1%} of their {of:,} numbers"
    )


def _parameters(found: dict) -> list[str]:
    rows = [("parameter", "shape", "split over", "a device")]
    for x in found["parameters"]:
        over = " x ".join("+".join(axes) or "-" for axes in x["over"])
        shape = " x ".join(map(str, x["shape"])) or "scalar"
        rows.append((x["name"], shape, over if any(x["over"]) else "", x["bytes"]))
    rows[1:] = [(*row[:3], binary_size(row[3])) for row in rows[1:]]
    return aligned(rows, left=3)


def _flops(counted: dict | None) -> str:
    if counted is None:
        return "not known: the model does not count them (Model.flops)"
    return (
        f"{_scaled(counted['useful'])} useful a step, "
        f"{_scaled(counted['per_token'])} a token"
    )


def _compiler(counts: dict) -> str:
    text = (
        f"{_scaled(counts['flops'] or 0)}FLOP and {_scaled(counts['bytes'] or 0)}B a "
        "device (of a loop one round, of a kernel nothing)"
    )
    if counts["seconds"] and counts["seconds"] > 0:
        text += f"; its own estimate {1e3 * counts['seconds']:.2f} ms"
    return text


def _least(sent: dict) -> str:
    known = [f"{reason} {binary_size(size)}" for reason, size in sent.items() if size]
    known += [f"{reason} not known" for reason, size in sent.items() if size is None]
    return f"{', '.join(known) or 'nothing'} (gradients in float32)"


def _scaled(x: float) -> str:
    power = min(4, int(math.log(max(x, 1), 1000)))
    return f"{x / 1000**power:,.4g} {' kMGT'[power].strip()}"


def _memory(found: dict) -> str:
    memory = dict(found["memory"])
    total, available, fits = (memory.pop(k) for k in ("total", "available", "fits"))
    parts = ", ".join(
        f"{k} {'not known' if v is None else binary_size(v)}" for k, v in memory.items()
    )
    of = f" of {binary_size(available)}" if available else ""
    verdict = {True: "fits", False: "DOES NOT FIT"}.get(fits, "")
    if fits is None:
        what = "what the step adds" if available else "how much it has"
        verdict = f"not known {what}"
    if "refused" in found:
        estimated = "" if memory["temporaries"] is None else "temporaries estimated; "
        parts += f" ({estimated}the compiler: {found['refused']})"
    return f"{parts}: {binary_size(total)}{of} a device: {verdict}"


def _time(found: dict) -> list[tuple[str, str]]:
    if "seconds" not in found:
        return [("time", "not known: no datasheet of this device")]
    seconds = found["seconds"]
    parts = ", ".join(f"{k} {1e3 * v:.2f} ms" for k, v in seconds.items())
    if "schedule" not in found:
        return [("time", f"{parts}; computing and the schedule not known")]
    schedule = found["schedule"]
    taken = f"{schedule['hours']:,.1f} h, {schedule['chip_hours']:,.0f} chip-hours"
    if "price" in schedule:
        taken += f", {schedule['price']:,.0f} at the price given"
    if seconds["roofline"] > seconds["at_mfu"]:
        most = seconds["compute"] / seconds["roofline"]
        parts += f"; MFU {most:.2f} is the most that this leaves"
    return [
        ("time", parts),
        ("efficiency", f"{found['efficiency']:.3f} if no traffic is hidden"),
        (
            "schedule",
            f"{schedule['steps']:,} steps at MFU {schedule['mfu']}: {taken}",
        ),
    ]
