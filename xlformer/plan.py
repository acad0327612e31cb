"""Plans a run for a machine that is not here: python -m xlformer.plan --config=NAME
--topology=v5p:4x4x4.

Compiles the training step with the compiler of that machine, where it is installed
(pip install 'xlformer[tpu]' or 'xlformer[cuda12]'), and reads from the program what it
will take: memory, FLOPs, traffic. Elsewhere, and with --arithmetic, it is arithmetic,
and says so. The schedule is priced at an assumed MFU. Exit code 1 if the memory is too
small. No data is needed.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time

import jax
from etils import epath
from jax.sharding import AbstractMesh, AxisType

from xlformer import command, models, sharding
from xlformer import config as config_lib
from xlformer.errors import UserError, reason
from xlformer.machines import chips, rehearsal, topologies, traffic
from xlformer.machines.plan_text import table
from xlformer.models.base import compute_dtype

# Kept for the backward pass of a layer without remat, in numbers a token. Fitted to
# what libtpu 0.0.42 makes of 4 rows on a v5e: 1.3 GiB of enwik8_base, 6.6 of _large.
PER_WIDTH, PER_INNER = 13, 8


def plan(
    spec: str,
    config,
    topology: str,
    *,
    sizes: dict | None = None,
    mfu: float = 0.4,
    price_per_chip_hour: float | None = None,
    arithmetic: bool = False,
    all_layers: bool = False,
) -> dict:
    """What a run of this config takes on a machine; see the module.

    Args:
      spec: the name that the config was loaded by: its file knows the vocabulary.
      config: config.model.dtype 'auto' becomes bfloat16, in place, but for 'local'.
      sizes: of the mesh; by default config.mesh.
      arithmetic: do not compile.
      all_layers: of layers in a loop the compiler counts one round; compile two small
        programs more, which tell what all rounds take.

    Raises:
      UserError: an unknown topology, or a mesh or batch that does not fit it.
    """
    chip, mesh, note = _machine(
        topology,
        sizes or dict(config.mesh),
        rows=config.train.batch_size,
        arithmetic=arithmetic,
    )
    if topology != "local" and config.model.dtype == "auto":
        with config.unlocked():
            config.model.dtype = "bfloat16"  # 'auto' would ask the devices here
    sharding.check(config, mesh)
    model = models.build(config.model, vocab_size=rehearsal.vocab_size(spec, config))
    abstract, placed = rehearsal.shapes(config, model, mesh)
    found = {
        "config": config.name,
        "topology": topology,
        "mesh": dict(mesh.shape),
        "devices": mesh.size,
        "how": "arithmetic" if note else "compiled",
        "note": note,
        "memory": _state_memory(abstract, placed),
    }
    compiled = None if note else _compile(found, config, model, mesh)
    if compiled is None:
        temporaries = _temporaries(config, abstract, placed, mesh)
        found["memory"]["temporaries"] = temporaries
        found["memory"]["total"] = sum(found["memory"].values())
    _judge(found, chip, config, mesh)
    _count(found, config, model, mesh, compiled, all_layers=all_layers)
    links = traffic.least(
        abstract,
        placed,
        mesh.shape,
        dtype=compute_dtype(config.model.dtype),
        config=config,
    )
    _time(found, chip, config, links, mfu=mfu, price=price_per_chip_hour)
    return found


# The machine --------------------------------------------------------------------------


def _machine(topology: str, sizes: dict, *, rows: int, arithmetic: bool):
    """(chip or None if not known, mesh, why nothing can be compiled)."""
    if topology == "local":
        chip = chips.of_kind(jax.devices()[0].device_kind)
        mesh = sharding.make_mesh(sizes, rows=rows, where="--mesh")
        return chip, mesh, "--arithmetic" if arithmetic else None
    found = topologies.find(topology, compiler=not arithmetic)
    chip = chips.CHIPS[found.chip]
    if found.devices:
        mesh = sharding.make_mesh(sizes, devices=found.devices, where="--mesh")
        return chip, mesh, None
    sizes = sharding.fit_mesh(sizes, found.count, where="--mesh")
    types = (AxisType.Auto,) * len(sizes)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
    return chip, mesh, "--arithmetic" if arithmetic else found.note


# Memory -------------------------------------------------------------------------------


def _here(tree, shardings) -> int:
    """Bytes that one device holds of it."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in leaves)


def _state_memory(abstract, placed) -> dict:
    return {
        "parameters": _here(abstract.params, placed.params),
        "optimizer": _here(
            (abstract.opt_state, abstract.ema), (placed.opt_state, placed.ema)
        ),
        "carried": _here(abstract.carried, placed.carried),
    }


def _compile(found: dict, config, model, mesh):
    """The compiled step, or None where its memory already does not suffice."""
    start = time.perf_counter()
    try:
        compiled = _step(config, model, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found["refused"] = reason(error)
        return None
    found["compile_seconds"] = time.perf_counter() - start
    memory, stats = found["memory"], compiled.memory_analysis()
    known = sum(memory.values())
    arguments = stats.argument_size_in_bytes
    memory["temporaries"] = stats.temp_size_in_bytes
    # What the layout adds to the state, the batch, and the metrics.
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory["padding and batch"] = max(0, arguments - known) + max(0, new)
    memory["program"] = stats.generated_code_size_in_bytes
    memory["total"] = sum(memory.values())
    return compiled


def _step(config, model, mesh):
    step = rehearsal.step(config, model, mesh)
    with jax.set_mesh(mesh):  # It says for what kind of device.
        return step.function.lower(step.abstract, step.batch).compile()


def _temporaries(config, abstract, placed, mesh) -> int:
    """An estimate: gradients, and what the backward pass keeps of each layer."""
    fields, train = config.model, config.train
    rows = train.batch_size / sharding.row_shards(mesh) / train.micro_batches
    tokens = rows * train.segment_length
    width = compute_dtype(fields.dtype).itemsize
    layer = PER_WIDTH * fields.d_model + PER_INNER * fields.d_inner
    kept = fields.d_model if fields.remat == "full" else layer
    numbers = tokens * (fields.n_layer * kept + layer)
    return _here(abstract.params, placed.params) + int(numbers * width)


def _judge(found: dict, chip, config, mesh) -> None:
    memory = found["memory"]
    memory["available"] = chip.memory if chip else None
    memory["fits"] = "refused" not in found
    if chip and memory["total"] > chip.memory:
        memory["fits"] = False
    found["advice"] = [] if memory["fits"] else _advice(memory, config, mesh)


def _advice(memory: dict, config, mesh) -> list[str]:
    """What to change, the cheapest first."""
    train, sizes, found = config.train, mesh.shape, []
    rows = train.batch_size // sharding.row_shards(mesh) // train.micro_batches
    state = memory["parameters"] + memory["optimizer"]
    if state > (memory["available"] or 0) / 4 and sizes["data"] % 2 == 0:
        halves = f"data={sizes['data'] // 2},fsdp={2 * sizes['fsdp']}"
        found.append(f"--mesh={halves}")
    if config.model.get("remat") == "none":
        found.append("--config.model.remat=full")
    if rows > 1:
        found.append(f"--config.train.micro_batches={2 * train.micro_batches}")
    return found or ["more devices, or --config.train.batch_size lower"]


# Work, traffic and time ---------------------------------------------------------------


def _count(found, config, model, mesh, compiled, *, all_layers: bool) -> None:
    train = config.train
    useful = model.flops(
        batch_size=train.batch_size, segment_length=train.segment_length
    ).training
    tokens = train.batch_size * train.segment_length
    found["flops"] = {"useful": useful, "per_token": useful / tokens}
    if compiled is None:
        return
    looped = config.model.get("scan_layers") and config.model.get("n_layer", 1) > 1
    cost = compiled.cost_analysis()
    if cost and looped and all_layers:
        cost = _cost(config, model, mesh)
    if cost:  # The compiler for GPUs that are not here counts nothing.
        found["compiler"] = {
            "all_layers": all_layers or not looped,
            "flops": cost.get("flops"),
            "bytes": cost.get("bytes accessed"),
            "seconds": cost.get("optimal_seconds"),
        }
    found["collectives"] = {
        kind: one._asdict()
        for kind, one in traffic.collectives(compiled.as_text(), mesh.size).items()
    }


def _cost(config, model, mesh) -> dict:
    """The compiler's counts of all layers: of a loop it counts one round only.

    Each layer adds the same, so programs with one and with two unrolled layers tell.
    """
    few = []
    for n_layer in (1, 2):
        small = config.copy_and_resolve_references()
        with small.unlocked():
            small.model.update(n_layer=n_layer, scan_layers=False)
        smaller = models.build(small.model, vocab_size=model.vocab_size)
        few.append(_step(small, smaller, mesh).cost_analysis())
    one, two = few
    more = config.model.n_layer - 1
    return {k: one[k] + more * (two[k] - one[k]) for k in one if k in two}


def _time(found, chip, config, links: dict, *, mfu: float, price) -> None:
    """Seconds of a step by what limits it, and of the whole schedule."""
    found["least_sent"] = links
    if chip is None:
        return
    each = found["flops"]["useful"] / found["devices"]
    counts = found.get("compiler", {})
    moved = counts.get("bytes") if counts.get("all_layers") else None
    kinds = found.get("collectives", {}).values()
    sent = sum(one["sent"] for one in kinds) if kinds else sum(links.values())
    seconds = {"compute": each / chip.flops, "links": sent / chip.link}
    if moved:
        seconds["memory"] = moved / chip.bandwidth
    seconds["roofline"] = max(seconds.values())
    seconds["at_mfu"] = each / chip.flops / mfu
    busy = seconds["at_mfu"]
    found["seconds"] = seconds
    found["efficiency"] = busy / (busy + seconds["links"])
    hours = config.train.steps * busy / found["efficiency"] / 3600
    found["schedule"] = {
        "steps": config.train.steps,
        "mfu": mfu,
        "hours": hours,
        "chip_hours": hours * found["devices"],
    }
    if price is not None:
        found["schedule"]["price"] = price * hours * found["devices"]


# The command --------------------------------------------------------------------------


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.plan", description=__doc__)
    parser.add_argument("--config", required=True, help="NAME[:args] or FILE.py[:args]")
    parser.add_argument("--topology", required=True, help=topologies.KNOWN)
    parser.add_argument("--mesh", help=sharding.MESH_HELP)
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed")
    parser.add_argument("--price_per_chip_hour", type=float)
    parser.add_argument("--arithmetic", action="store_true", help="do not compile")
    parser.add_argument(
        "--all_layers",
        action="store_true",
        help="have the compiler count all rounds of the loop over layers: two more "
        "programs",
    )
    parser.add_argument(
        "--json", type=command.place, help="a file for the same in numbers"
    )
    args, overrides = parser.parse_with_overrides(argv)
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu={args.mfu} must be above 0 and at most 1")
    if args.price_per_chip_hour is not None and not args.price_per_chip_hour >= 0:
        raise UserError(
            f"--price_per_chip_hour={args.price_per_chip_hour} must not be negative"
        )
    if args.topology != "local":
        # No TPU is looked for: neither here, nor by the compiler on a metadata server.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        jax.config.update("jax_platforms", "cpu")
    found = plan(
        args.config,
        config_lib.load(args.config, overrides),
        args.topology,
        sizes=sharding.parse_mesh(args.mesh) if args.mesh else None,
        mfu=args.mfu,
        price_per_chip_hour=args.price_per_chip_hour,
        arithmetic=args.arithmetic,
        all_layers=args.all_layers,
    )
    print(table(found))
    if args.json:
        epath.Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0 if found["memory"]["fits"] else 1


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
