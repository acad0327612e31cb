"""One workload for every value that is compared, and the published presets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from xlformer import config as config_lib
from xlformer import models, sharding
from xlformer.errors import Argument, UserError
from xlformer.machines import bench_presets, rehearsal
from xlformer.machines.bench_timing import Timing, measure, memory_may_end, report
from xlformer.machines.bench_workloads import WORKLOADS, matrix_products
from xlformer.models import Model
from xlformer.models.parameters import abstract_params, count

# More than the largest cutoff of a shrunk model, or its softmax could not be built.
REHEARSED_VOCABULARY = 32


class Values(NamedTuple):
    """A field of the config, and what it is tried with."""

    field: str
    values: Sequence[str]


UNCHANGED = Values("", ("",))


class Tried(NamedTuple):
    """What is timed: a config, its model, and what tells it from the others."""

    config: ConfigDict
    model: Model
    name: str


def bench(
    config: ConfigDict,
    *,
    model: Model | None = None,
    against: Sequence[ConfigDict] = (),
    mode: str = "train",
    compare: Values = UNCHANGED,
    sweep: Values = UNCHANGED,
    repeats: int = 5,
    seconds: float = 1.0,
    sizes: dict | None = None,
) -> list[dict]:
    """Times a model on the devices here.

    Args:
      config: needs config.model.vocab_size, unless there is a model.
      model: your own, in place of models.build(config.model).
      against: other configs, of any model, which are timed in turns with it.
      mode: 'train', 'eval' or 'generate'.
      compare: what is timed in turns, all of it compiled first; of one config.
      sweep: what is timed one after the other, each with all of `compare`.
      repeats, seconds: turns of each, and how long one takes.
      sizes: of the mesh; by default config.mesh.

    Returns:
      A row of numbers for each (bench_timing.report), in this order.

    Raises:
      UserError: what cannot run here, before anything is compiled.
    """
    configs = [config, *against]
    rows = math.gcd(*(one.train.batch_size for one in configs))
    mesh = sharding.make_mesh(sizes or config.mesh, rows=rows, where=Argument("mesh"))
    names = [one.name for one in configs] if against else compare.values
    # All of them before the first is timed: a value that is refused says so at once.
    groups = [
        [
            _tried(one, model, name, {sweep.field: value, compare.field: other})
            for (one, other), name in zip(
                itertools.product(configs, compare.values), names, strict=True
            )
        ]
        for value in sweep.values
    ]
    if len(names) > 1:
        for tried in groups[0]:
            _trace(tried.config, tried.model, mesh)
    found = []
    for value, group in zip(sweep.values, groups, strict=True):
        # With the list goes what the last value held on the device.
        timings = []
        for tried in group:
            swept = f"{sweep.field.rpartition('.')[2]}={value}" if sweep.field else ""
            name = " ".join(filter(None, (tried.name, swept))) or mode
            # It stands there before it is made: where memory ends while compiling, the
            # row says so.
            timings.append(Timing(name))
            with memory_may_end(timings[-1]):
                timings[-1] = WORKLOADS[mode](name, tried.config, tried.model, mesh)
        products = _products([tried.model for tried in group], timings, mesh)
        measure([*timings, *products], repeats=repeats, seconds=seconds)
        for timing, tried in zip(timings, group, strict=True):
            row = report(timing, products[0] if products else None, mesh)
            row |= circumstances(tried.config, tried.model, mode, mesh)
            row |= {"compared": tried.name, "field": sweep.field, "value": value}
            found.append(row)
    return found


def _tried(config, model, name: str, changes: dict[str, str]) -> Tried:
    """The config and the model with other values of some fields."""
    config = config.copy_and_resolve_references()
    for field, text in changes.items():
        if field.startswith("model.") and model is not None:
            raise UserError(f"config.{field} has no effect on a model of your own")
        if field:
            config_lib.set_field(config, field, text)
    config_lib.check(config)
    return Tried(config, model or models.build(config.model), name)


def _trace(config, model: Model, mesh) -> None:
    """Traces a model, as what cannot run here should say so before others compile."""
    shape = (sharding.padded(1, mesh), config.train.segment_length)
    tokens_BT = jax.ShapeDtypeStruct(shape, "int32")
    params = abstract_params(model)
    state = jax.eval_shape(lambda: model.init_state(tokens_BT.shape[0]))
    with jax.set_mesh(mesh):
        jax.eval_shape(model.apply, params, tokens_BT, tokens_BT, state)


def _products(models: list[Model], timings: list[Timing], mesh) -> list[Timing]:
    """Matrix products to compare with; none where no width or nothing is known.

    Of the widest model, so that all are held to the same.
    """
    at_once = max(timing.at_once for timing in timings)
    if not at_once or any(model.width is None for model in models):
        return []
    widest = max(models, key=lambda model: model.width)
    return [matrix_products(widest.width, _dtype(widest), at_once, mesh)]


def circumstances(config, model: Model, mode: str, mesh) -> dict:
    """What the numbers of a row depend on."""
    params = abstract_params(model)
    dtype = model.dtype(params)
    return {
        "config": config.name,
        "parameters": count(params),
        "mode": mode,
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "dtype": dtype and dtype.name,
        "jax": jax.__version__,
    }


def _dtype(model: Model):
    return model.dtype(abstract_params(model))


def bench_preset(
    name: str, overrides: Sequence[str] = (), *, rehearse: bool = False, **options
) -> Iterator[list[dict]]:
    """Yields the rows of each line of a preset as they are measured.

    Args:
      rehearse: with tiny sizes, to see that all of it runs; nothing is compared.
      options: of `bench`.
    """
    for line in bench_presets.lines(name):
        config = config_lib.load(line.config, [*line.overrides, *overrides])
        size = rehearsal.vocab_size(line.config, config)
        if rehearse:
            config, size = config_lib.shrink(config), REHEARSED_VOCABULARY
        config.model.vocab_size = size
        rows = bench(config, mode=line.mode, **options)
        for row in rows:
            told = f", {row['name']}" if row["compared"] else ""
            row["name"] = f"{line.label}{told}"
            if line.published and not rehearse:
                row["published"] = line.published._asdict()
        yield rows
