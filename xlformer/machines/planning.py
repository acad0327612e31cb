"""What a run takes on a machine: memory, FLOPs, traffic, time and money.

Compiled where the machine's compiler is installed, else by arithmetic. What only the
model knows is asked of the model; where it does not know, the plan does not either.
"""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from xlformer import models, sharding
from xlformer.errors import Argument, is_out_of_memory, reason
from xlformer.machines import chips, rehearsal, topologies, traffic
from xlformer.models import Model
from xlformer.training.compiling import TrainingStep

HERE = "local"  # the topology of the devices of this process


def plan(
    config: ConfigDict,
    topology: str,
    *,
    model: Model | None = None,
    sizes: dict | None = None,
    mfu: float = 0.4,
    price_per_chip_hour: float | None = None,
    arithmetic: bool = False,
) -> dict:
    """What a run of this config takes on a machine; what is not known is None.

    Args:
      config: needs config.model.vocab_size, unless there is a model. The model's dtype
        'auto' becomes bfloat16 but for 'local': other devices are not here to be asked.
      topology: 'v5p:4x4x4', 'h100:8', or 'local'.
      model: your own, in place of models.build(config.model).
      sizes: of the mesh; by default config.mesh.
      mfu: the share of the datasheet's FLOPs that the schedule is priced at.
      arithmetic: do not compile.

    Raises:
      UserError: an unknown topology, or a mesh or batch that does not fit it.
    """
    chip, mesh, note = _machine(
        topology,
        sizes or dict(config.mesh),
        rows=config.train.batch_size,
        arithmetic=arithmetic,
    )
    sharding.check(config, mesh)
    if model is None:
        fields = dict(config.model)
        # All machines that are known here have matrix units for bfloat16.
        if topology != HERE and fields.get("dtype") == "auto":
            fields["dtype"] = "bfloat16"
        model = models.build(fields)
    model.check_mesh(mesh)
    step = TrainingStep(config, model, mesh)
    dtype = model.dtype(step.abstract.params)
    found = {
        "config": config.name,
        "topology": topology,
        "mesh": dict(mesh.shape),
        "devices": mesh.size,
        "dtype": dtype and dtype.name,
        "how": "arithmetic" if note else "compiled",
        "note": note,
        "memory": _state_memory(step.abstract, step.placed),
        "parameters": _parameters(step.abstract.params, step.placed.params),
    }
    # Also where the compiler refuses: it says that memory is short, not by how much.
    if note or not _compile(found, step, rehearsal.batch(config, model)):
        found["memory"]["temporaries"] = _temporaries(found, config, model, mesh)
    _judge(found, chip, config, model, mesh)
    found["flops"] = _flops(config, model)
    found["least_sent"] = _least_sent(found, config, model, mesh, step)
    if chip is not None:
        found["seconds"] = _seconds(found, chip, mfu)
        if found["flops"]:
            _schedule(found, config, mfu=mfu, price=price_per_chip_hour)
    return found


# The machine --------------------------------------------------------------------------


def _machine(topology: str, sizes: dict, *, rows: int, arithmetic: bool):
    """(chip or None if not known, mesh, why nothing can be compiled)."""
    if topology == HERE:
        chip = chips.of_kind(jax.devices()[0].device_kind)
        mesh = sharding.make_mesh(sizes, rows=rows, where=Argument("mesh"))
        return chip, mesh, "--arithmetic" if arithmetic else None
    found = topologies.machine(topology, compiler=not arithmetic)
    chip = chips.CHIPS[found.chip]
    if found.devices:
        mesh = sharding.make_mesh(sizes, devices=found.devices, where=Argument("mesh"))
        return chip, mesh, None
    sizes = sharding.fit_mesh(sizes, found.count, where=Argument("mesh"))
    types = (AxisType.Auto,) * len(sizes)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
    return chip, mesh, "--arithmetic" if arithmetic else found.note


# Memory -------------------------------------------------------------------------------


def _state_memory(abstract, placed) -> dict:
    return {
        "parameters": _on_device(abstract.params, placed.params),
        "optimizer": _on_device(
            (abstract.opt_state, abstract.ema), (placed.opt_state, placed.ema)
        ),
        "carried": _on_device(abstract.carried, placed.carried),
    }


def _parameters(params, placed) -> list[dict]:
    """How each array of the parameters is split: over which axes of the mesh."""
    found = []
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, x), place in zip(leaves, jax.tree.leaves(placed), strict=True):
        parts = [*place.spec, *[None] * len(x.shape)][: len(x.shape)]
        over = [[a for a in traffic.axes(p) if place.mesh.shape[a] > 1] for p in parts]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        size = _on_device(x, place)
        found.append({"name": name, "shape": x.shape, "over": over, "bytes": size})
    return found


def _on_device(tree, shardings) -> int:
    """Bytes that one device holds of it."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in leaves)


def _compile(found: dict, step: TrainingStep, batch: dict) -> bool:
    """Asks the compiler; False where it refuses, as the memory does not suffice."""
    start = time.perf_counter()
    try:
        compiled = step.compile(batch)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        found["refused"] = reason(error)
        return False
    found["compile_seconds"] = time.perf_counter() - start
    memory, stats = found["memory"], compiled.memory_analysis()
    known = sum(memory.values())
    arguments = stats.argument_size_in_bytes
    memory["temporaries"] = stats.temp_size_in_bytes
    # What the layout adds to the state, the batch, and the metrics.
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory["padding and batch"] = max(0, arguments - known) + max(0, new)
    memory["program"] = stats.generated_code_size_in_bytes
    # NVIDIA's compiler counts nothing.
    if cost := compiled.cost_analysis():
        found["compiler"] = {
            "flops": cost.get("flops"),
            "bytes": cost.get("bytes accessed"),
            "seconds": cost.get("optimal_seconds"),
        }
    collectives = traffic.collectives(compiled.as_text(), found["devices"])
    found["collectives"] = {kind: one._asdict() for kind, one in collectives.items()}
    return True


def _temporaries(found: dict, config, model: Model, mesh) -> int | None:
    """An estimate: gradients, and what stays for the backward pass of a micro-batch."""
    kept = model.kept_for_backward()
    if kept is None:
        return None
    tokens = _tokens(config, mesh) / config.train.micro_batches
    # Gradients are as large as the parameters. What a layer keeps was fitted to enwik8
    # with 4 rows on a v5e (2 % off); with one row it is a third too low, and the plan
    # says that nothing was compiled.
    return found["memory"]["parameters"] + int(tokens * kept * _itemsize(found))


def _judge(found: dict, chip, config, model: Model, mesh) -> None:
    """Adds whether it fits (None is not known), and what to change if not."""
    memory = found["memory"]
    total = sum(size for size in memory.values() if size is not None)
    if "refused" in found or (chip and total > chip.memory):
        fits = False
    else:
        # Without the temporaries a sum that is too large is an answer, one that fits is
        # none.
        fits = True if chip and memory["temporaries"] is not None else None
    memory |= {"total": total, "available": chip and chip.memory, "fits": fits}
    found["advice"] = _advice(memory, config, model, mesh) if fits is False else []


def _advice(memory: dict, config, model: Model, mesh) -> list[str]:
    """What to change, the cheapest first."""
    train, found = config.train, []
    rows = train.batch_size // sharding.row_shards(mesh) // train.micro_batches
    state = memory["parameters"] + memory["optimizer"]
    sizes = sharding.with_less_state(mesh.shape)
    # Where the state is a small part of the memory, half of it would not make room.
    if sizes and state > (memory["available"] or 0) / 4:
        changed = [f"{a}={n}" for a, n in sizes.items() if n != mesh.shape[a]]
        found.append(f"--mesh={','.join(changed)}")
    for field, value in model.to_save_memory().items():
        found.append(f"--config.model.{field}={value}")
    if rows > 1:
        found.append(f"--config.train.micro_batches={2 * train.micro_batches}")
    return found or ["more devices, or --config.train.batch_size lower"]


# Work and time ------------------------------------------------------------------------


def _tokens(config, mesh) -> float:
    """Tokens of one step on one device of those that share the rows."""
    tokens = config.train.batch_size * config.train.segment_length
    return tokens / sharding.row_shards(mesh)


def _itemsize(found: dict) -> int:
    """Bytes of a number that is computed with; parameters are in float32."""
    return jnp.dtype(found["dtype"] or "float32").itemsize


def _flops(config, model: Model) -> dict | None:
    train = config.train
    counted = model.flops(
        batch_size=train.batch_size, segment_length=train.segment_length
    )
    if counted is None:
        return None
    tokens = train.batch_size * train.segment_length
    return {"useful": counted.training, "per_token": counted.training / tokens}


def _least_sent(found: dict, config, model: Model, mesh, step: TrainingStep) -> dict:
    summed = model.summed_activations()
    return traffic.least(
        step.abstract.params,
        step.placed.params,
        mesh.shape,
        itemsize=_itemsize(found),
        summed=None if summed is None else summed * _tokens(config, mesh),
    )


def _seconds(found: dict, chip, mfu: float) -> dict:
    """The least seconds of a step by each thing that limits it, if none else did."""
    collectives, memory = found.get("collectives"), found["memory"]
    if collectives:
        sent = sum(one["sent"] for one in collectives.values())
    else:
        # Nothing compiled: the least that must be sent stands in for what is.
        sent = sum(size for size in found["least_sent"].values() if size is not None)
    # Parameters and moments are read and written once, whatever else is.
    moved = 2 * (memory["parameters"] + memory["optimizer"])
    seconds = {"links": sent / chip.link, "memory": moved / chip.bandwidth}
    if found["flops"]:
        each = found["flops"]["useful"] / found["devices"]
        seconds = {"compute": each / chip.flops, **seconds}
        seconds["roofline"] = max(seconds.values())
        seconds["at_mfu"] = seconds["compute"] / mfu
    return seconds


def _schedule(found: dict, config, *, mfu: float, price: float | None) -> None:
    """Adds time and price of all steps, with no traffic hidden behind computing."""
    busy, steps = found["seconds"]["at_mfu"], config.train.steps
    # A lower bound: compilers hide part of the traffic behind computing.
    found["efficiency"] = busy / (busy + found["seconds"]["links"])
    hours = steps * busy / found["efficiency"] / 3600
    chip_hours = hours * found["devices"]
    found["schedule"] = {
        "steps": steps,
        "mfu": mfu,
        "hours": hours,
        "chip_hours": chip_hours,
    }
    if price is not None:
        found["schedule"]["price"] = price * chip_hours
