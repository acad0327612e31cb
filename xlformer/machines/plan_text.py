"""A plan as text, for people."""

from __future__ import annotations

import math

from xlformer.tables import binary_size


def table(found: dict) -> str:
    """The plan for people."""
    shape = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    how = f"arithmetic, nothing compiled: {found['note']}"
    if not found["note"]:
        how = f"compiled in {found.get('compile_seconds', 0):.0f} s"
    lines = [
        f"{found['config']} on {found['topology']}: mesh {shape}; {how}",
        _memory_line(found),
        *(f"{'change':<12}{advice}" for advice in found["advice"]),
        f"{'FLOPs':<12}{_scaled(found['flops']['useful'])} useful a step, "
        f"{_scaled(found['flops']['per_token'])} a token",
    ]
    if found.get("compiler"):
        lines.append(_compiler_line(found["compiler"]))
    for kind, one in found.get("collectives", {}).items():
        lines.append(
            f"{'traffic':<12}{one['count']} {kind}: {binary_size(one['size'])}, "
            f"{binary_size(one['sent'])} sent by each device"
        )
    reasons = [f"{k} {binary_size(v)}" for k, v in found["least_sent"].items() if v]
    least = ", ".join(reasons) or "nothing"
    lines.append(f"{'least sent':<12}{least} (gradients in float32)")
    return "\n".join(lines + _time_lines(found))


def _compiler_line(counts) -> str:
    what = "all layers" if counts["all_layers"] else "a loop's round once"
    text = (
        f"{_scaled(counts['flops'] or 0)}FLOP and {_scaled(counts['bytes'] or 0)}B a "
        f"device ({what}; kernels not counted)"
    )
    if counts["seconds"] and counts["seconds"] > 0:
        text += f"; its own estimate {1e3 * counts['seconds']:.2f} ms"
    return f"{'compiler':<12}{text}"


def _scaled(x: float) -> str:
    power = min(4, int(math.log(max(x, 1), 1000)))
    return f"{x / 1000**power:,.4g} {' kMGT'[power].strip()}"


def _memory_line(found) -> str:
    memory = dict(found["memory"])
    total, available, fits = (memory.pop(k) for k in ("total", "available", "fits"))
    parts = ", ".join(f"{k} {binary_size(v)}" for k, v in memory.items())
    of = f" of {binary_size(available)}" if available else ""
    verdict = "fits" if fits else "DOES NOT FIT"
    if not available and fits:
        verdict = "how much there is, is not known"
    if "refused" in found:
        parts += f" (temporaries estimated; the compiler: {found['refused']})"
    return f"{'memory':<12}{parts}: {binary_size(total)}{of} a device: {verdict}"


def _time_lines(found) -> list[str]:
    if "seconds" not in found:
        return [f"{'time':<12}not known: no datasheet of this device"]
    seconds, plan_ = found["seconds"], found["schedule"]
    parts = ", ".join(f"{k} {1e3 * v:.2f} ms" for k, v in seconds.items())
    cost = f", {plan_['price']:,.0f} at the price given" if "price" in plan_ else ""
    if seconds["roofline"] > seconds["at_mfu"]:
        most = seconds["compute"] / seconds["roofline"]
        parts += f"; MFU {most:.2f} is the most that this leaves"
    return [
        f"{'time':<12}{parts}",
        f"{'efficiency':<12}{found['efficiency']:.3f} if no traffic is hidden",
        f"{'schedule':<12}{plan_['steps']:,} steps at MFU {plan_['mfu']}: "
        f"{plan_['hours']:,.1f} h, {plan_['chip_hours']:,.0f} chip-hours{cost}",
    ]
