"""What a compiled program sends between devices, and the least that it must."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax

from xlformer import sharding

# The text of HLO, line by line. '%name (arguments) -> result {' begins a computation,
# 'ENTRY' in front of it the program.
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
# ' = f32[8,16]{1,0} all-gather(': the shape of the result, then the operation; '-start'
# if it is awaited by another line.
_OPERATION = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(-start)?\("
)
# 'bf16[8,16]' or 'f8e4m3fn[4]': the first number of a dtype is its width in bits.
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
# Computations that run once where they are named: fusions and sums.
_CALLED = re.compile(r"(?:calls|to_apply)=%([\w.-]+)")
# Of these one runs: lax.cond and lax.switch are written the same way (jaxlib 0.10.2).
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%([\w.-]+), body=%([\w.-]+)")
# TPU: operations of one exchange share it.
_CHAIN = re.compile(r'chain_id="(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# In a loop's condition: what its counter is compared with.
_CONSTANT = re.compile(r"= s\d+\[\]\S* constant\((\d+)\)")


class Collective(NamedTuple):
    """All exchanges of one kind in a step.

    Attributes:
      count: how many there are.
      size: bytes of their results, on one device.
      sent: bytes that a device sends if the exchange goes around a ring.
    """

    count: int
    size: float
    sent: float


def collectives(text: str, devices: int) -> dict[str, Collective]:
    """Reads the exchanges from Compiled.as_text(), by kind.

    One in a loop counts once a round, and of a conditional the branch that sends the
    most. A TPU's compiler spreads one exchange over several operations of a chain,
    which count once together.

    Args:
      devices: how many take part where the text does not say so.
    """
    bodies, entry = _computations(text)
    chains = set()

    def visit(name) -> dict[str, Collective]:
        found: dict[str, Collective] = {}
        for line in bodies.get(name, ()):
            if loop := _LOOP.search(line):
                trips = _trips(line, bodies.get(loop[1], ()))
                _add(found, visit(loop[2]), times=trips)
            for called in _CALLED.findall(line):
                _add(found, visit(called))
            if branches := _BRANCHES.search(line):
                each = [visit(b.strip().lstrip("%")) for b in branches[1].split(",")]
                _add(
                    found, max(each, key=lambda one: sum(x.sent for x in one.values()))
                )
            if not (match := _OPERATION.search(line)):
                continue
            if chain := _CHAIN.search(line):
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            scattered = name.startswith("all-reduce-scatter")
            kind, size, sent = _measure(match, line, devices, scattered=scattered)
            _add(found, {kind: Collective(1, size, sent)})
        return found

    return visit(entry)


def _add(found: dict, more: dict, times: int = 1) -> None:
    for kind, one in more.items():
        before = found.get(kind, Collective(0, 0, 0))
        sums = (a + times * b for a, b in zip(before, one, strict=True))
        found[kind] = Collective(*sums)


def _computations(text: str):
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            entry = name if header[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _trips(line: str, condition) -> int:
    """Rounds of a loop: stated, or the number that its counter is compared with."""
    if stated := _TRIPS.search(line):
        return int(stated[1])
    bounds = [int(m[1]) for m in map(_CONSTANT.search, condition) if m]
    return max(bounds, default=1)


def _measure(match, line: str, devices: int, *, scattered: bool):
    kind, size, n = match[2], _bytes(match[1]), _group(line, devices)
    # Results of a '-start' are tuples: operand and result.
    if match[3] and kind == "all-gather":
        # What goes in, a part of n, stands beside what comes out.
        size *= n / (n + 1)
    elif match[3] and kind == "collective-permute":
        size /= 2
    # A TPU's compiler writes a reduce-scatter as a computation of this name, with an
    # all-reduce in it of which each device keeps its part.
    if scattered:
        kind, size = "reduce-scatter", size / n
    passed = {"all-reduce": _around_ring(n), "reduce-scatter": n - 1}
    passed["collective-permute"] = 1
    return kind, size, size * passed.get(kind, (n - 1) / n)


def _bytes(shape: str) -> float:
    total = 0.0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        total += math.prod(map(int, filter(None, sizes.split(",")))) * bits / 8
    return total


def _group(line: str, devices: int) -> int:
    """How many devices take part together."""
    # HLO writes groups as lists, {{0,1},{2,3}}, or as [number of groups,size of each].
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    return devices


def least(
    params, shardings, sizes: Mapping[str, int], *, itemsize: int, summed: float | None
) -> dict:
    """Bytes that each device must send in a step, by reason; None is not known.

    Each gradient goes once around the copies that differ, in float32. Parameters that
    are split over the rows' devices are gathered for the forward and for the backward
    pass in the compute dtype, and their gradients are scattered. Over an axis that
    splits no rows, activations are summed.

    Args:
      params, shardings: trees of shapes and of NamedShardings.
      sizes: of the mesh.
      itemsize: bytes of a number of the compute dtype.
      summed: numbers that a device sums with the others of such an axis.
    """
    found = {"gradients": 0.0, "parameters": 0.0, "activations": 0.0}
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
    for x, place in pairs:
        here = math.prod(place.shard_shape(x.shape))
        split = {axis for part in place.spec for axis in axes(part)}
        # Rows are split over these axes: each device has the gradient of its own rows
        # only.
        for axis in sharding.RULES["batch"]:
            n = sizes[axis]
            if axis in split:
                elsewhere = here * (n - 1)
                found["gradients"] += 4 * elsewhere
                found["parameters"] += 2 * itemsize * elsewhere
            else:
                found["gradients"] += 4 * here * _around_ring(n)
    others = [n for a, n in sizes.items() if a not in sharding.RULES["batch"] and n > 1]
    if others and summed is None:
        found["activations"] = None
    elif others:
        found["activations"] = summed * itemsize * sum(map(_around_ring, others))
    return found


def _around_ring(n: int) -> float:
    """How much of an array each of n devices sends for all to have the sum.

    Twice (n - 1) / n: to sum each part in one place, and to hand the sums around.
    """
    return 2 * (n - 1) / n


def axes(part) -> tuple[str, ...]:
    """The axes of the mesh over which a PartitionSpec splits one axis of an array."""
    if part is None:
        return ()
    return (part,) if isinstance(part, str) else tuple(part)
