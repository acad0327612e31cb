"""Is any damage to a checkpoint restored unnoticed? python tests/soak/flips.py

Saves two steps of a real training state. Damages every file of the newer one, one file
at a time: single bits flipped at random places, truncated, emptied, deleted. Restores
after each damage and tells four ends apart:

    refused   the older step was restored, and the log says why
    harmless  the newer step was restored with the values it was saved with
    changed   a step was restored with other values
    failed    no step was restored, although the older one is intact

Exit code 1 if anything changed or failed. With --plain Orbax restores the newer step
alone, with no digests: there `refused` is an error of Orbax.
"""

import argparse
import collections
import functools
import json
import logging
import pathlib
import random
import re
import sys
import tempfile
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp

from xlformer import config as config_lib
from xlformer import models
from xlformer.runs.checkpoints import Checkpoints
from xlformer.training import optimizers
from xlformer.training import state as state_lib

OLDER, NEWER = 1, 2
ENDS = ("refused", "harmless", "changed", "failed")


def make_state(config, step: int):
    """As training makes it, but without zeros: a flip may hide in none of them."""
    model = models.build(config.model, vocab_size=256)
    create = functools.partial(
        state_lib.create, config, model, optimizers.build(config.optimizer)
    )
    draw = np.random.default_rng(step)

    def fill(x):
        if not np.issubdtype(x.dtype, np.floating):
            return np.full(x.shape, step, x.dtype)
        return draw.standard_normal(x.shape).astype(x.dtype)

    return jax.tree.map(fill, jax.eval_shape(create, jax.random.key(0)))


def same(a, b) -> bool:
    """Bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def damages(content: bytes, flips: int, draw: random.Random):
    """(kind, where, damaged content) or None for a file that is deleted."""
    for bit in sorted(
        draw.sample(range(8 * len(content)), min(flips, 8 * len(content)))
    ):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield "flipped", f"bit {bit}", bytes(damaged)
    if len(content) > 1:
        length = draw.randrange(1, len(content))
        yield "truncated", f"to {length} bytes", content[:length]
    if content:
        yield "emptied", "", b""
    yield "deleted", "", None


class Log(logging.Handler):
    """What Checkpoints says, to see that a refusal is named."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def restore_ours(directory, states, config, log) -> tuple[str, str]:
    log.lines.clear()
    abstract = jax.eval_shape(lambda: states[NEWER])
    try:
        reader = Checkpoints(directory, read_only=True)
        step, found, stored = reader.restore(abstract)
    except Exception as error:
        return "failed", repr(error)
    if stored != config or not same(found, states[step]):
        return "changed", f"step {step}"
    if step == NEWER:
        return "harmless", ""
    text = "\n".join(log.lines)
    named = re.search(rf"refused: step {NEWER}: (.+)", text)
    if not named or f"fell back to the checkpoint of step {OLDER}" not in text:
        return "failed", "the log does not say why"
    return "refused", named[1]


def restore_plain(directory, states, config, log) -> tuple[str, str]:
    del log
    abstract = jax.tree.map(np.asarray, plain_tree(states[NEWER]))
    try:
        with ocp.CheckpointManager(directory) as manager:
            found = manager.restore(
                NEWER,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    config=ocp.args.JsonRestore(),
                ),
            )
    except Exception as error:
        return "refused", repr(error)
    intact = found["config"] == config and same(found["state"], abstract)
    return ("harmless", "") if intact else ("changed", "")


def plain_tree(state):
    return {"leaves": [np.atleast_1d(x) for x in jax.tree.leaves(state) if x.size]}


def save_plain(directory, states, config) -> None:
    with ocp.CheckpointManager(directory) as manager:
        for step, state in states.items():
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(plain_tree(state)),
                    config=ocp.args.JsonSave(config),
                ),
            )


def save_ours(directory, states, config) -> None:
    with Checkpoints(directory) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, config=config, metric=1.0)


def attack(directory, restore, *, flips: int, seed: int, log):
    """Yields (file, kind, where, end, reason)."""
    draw = random.Random(seed)
    root = directory / str(NEWER)
    for file in sorted(p for p in root.rglob("*") if p.is_file()):
        content = file.read_bytes()
        for kind, where, damaged in damages(content, flips, draw):
            file.unlink()  # never written through: Orbax may have it mapped
            if damaged is not None:
                file.write_bytes(damaged)
            end, reason = restore(directory, log=log)
            file.write_bytes(content)
            yield file.relative_to(root), kind, where, end, reason


def label(file: pathlib.Path) -> str:
    """Array data have random names: one line for those of a directory."""
    return f"{file.parent}/*" if file.parent.name == "d" else str(file)


def table(rows) -> str:
    counts = collections.defaultdict(collections.Counter)
    for file, kind, _, end, _ in rows:
        counts[label(file), kind][end] += 1
        counts["all files", kind][end] += 1
        counts["all files", "all"][end] += 1
    cells = [("file", "damage", "made", *ENDS)]
    for (name, kind), found in counts.items():
        made = sum(found.values())
        cells.append((name, kind, *(str(x) for x in (made, *(found[e] for e in ENDS)))))
    cells[1:] = sorted(cells[1:], key=lambda row: row[0] == "all files")
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            x.ljust(w) if i < 2 else x.rjust(w)
            for i, (x, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=4, help="bits for each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="Orbax without digests")
    parser.add_argument("--json", help="writes every damage and its end there")
    args = parser.parse_args()
    log = Log()
    # Where one of several reads fails Orbax abandons the others; each complains.
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None
    for name in ("absl", "asyncio", "xlformer"):
        logging.getLogger(name).propagate = False
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    logging.getLogger("xlformer").addHandler(log)
    config = config_lib.load("quickstart:debug")
    states = {step: make_state(config, step) for step in (OLDER, NEWER)}
    stored = json.loads(json.dumps(config.to_dict()))
    save, restore = (
        (save_plain, restore_plain) if args.plain else (save_ours, restore_ours)
    )
    restore = functools.partial(restore, states=states, config=stored)
    with tempfile.TemporaryDirectory() as parent:
        directory = pathlib.Path(parent) / "checkpoints"
        save(directory, states, stored)
        end, reason = restore(directory, log=log)
        assert end == "harmless", reason
        rows = list(
            attack(directory, restore, flips=args.flips, seed=args.seed, log=log)
        )
    print(table(rows))
    sums = collections.Counter(end for *_, end, _ in rows)
    missed = sums["changed"] + sums["failed"]
    flips = collections.Counter(end for _, kind, _, end, _ in rows if kind == "flipped")
    print(
        f"{'Orbax alone' if args.plain else 'xlformer'}, orbax {ocp.__version__}, "
        f"seed {args.seed}, {len(jax.tree.leaves(states[NEWER]))} leaves: "
        f"flips made {sum(flips.values())}, refused {flips['refused']}, harmless "
        f"{flips['harmless']}, missed {flips['changed'] + flips['failed']}; damages of "
        f"all kinds {len(rows)}, refused {sums['refused']}, harmless "
        f"{sums['harmless']}, missed {missed}"
    )
    for file, kind, where, end, reason in rows:
        if end in ("changed", "failed") and not args.plain:
            print(f"MISSED {file}: {kind} {where}: {end} {reason}")
    if args.json:
        names = ("file", "damage", "where", "end", "reason")
        found = [dict(zip(names, map(str, row), strict=True)) for row in rows]
        pathlib.Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return int(missed > 0 and not args.plain)


if __name__ == "__main__":
    sys.exit(main())
