"""Where arrays live: one mesh, and one table of rules.

Models name the axes of their parameters and their state; RULES says over which axes of
the mesh a name is split. Everything else is the compiler's: jit with NamedSharding.

    data     rows of the batch; parameters are copies
    fsdp     rows of the batch too; parameters and optimizer are split and gathered
             layer by layer when they are used (Zhao et al. 2023, arXiv:2304.11277)
    tensor   heads, feed-forward and vocabulary (Shoeybi et al. 2019, arXiv:1909.08053)

A new axis is a field of config.mesh (fields.TABLE) and its place in RULES: the mesh,
the flags and what `xlformer.plan` counts are made of the two.

Slices of TPUs that only the data center's network (DCN) joins lie along `data`, whose
sums of gradients are all that crosses it, once a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xlformer import fields
from xlformer.errors import Argument, UserError

MESH_AXES = tuple(fields.TABLE["mesh"])
MESH_HELP = (
    f"sizes of {', '.join(MESH_AXES)}: data=2,fsdp=4 (default: data is all devices)"
)
# A mesh axis is used once in an array: the leftmost name that asks for it gets it.
RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


# The mesh -----------------------------------------------------------------------------


def make_mesh(
    sizes: Mapping[str, int],
    *,
    devices: Sequence | None = None,
    rows: int = 0,
    where: str | Argument = "config.mesh",
) -> Mesh:
    """The mesh of all devices; a size of -1 is whatever is left.

    In one process a smaller mesh takes the first devices, and an axis of the batch that
    is -1 no more of them than divide `rows`. `devices` may be of a machine that is not
    here, to compile for. Raises UserError.
    """
    have = jax.device_count() if devices is None else len(devices)
    elsewhere = devices is not None or jax.process_count() > 1
    sizes = fit_mesh(sizes, have, rows=0 if elsewhere else rows, where=where)
    wanted = math.prod(sizes.values())
    if wanted < have and devices is None and jax.process_count() > 1:
        raise UserError(
            where,
            f": {_shown(sizes)} leaves {have - wanted} of {have} devices idle, "
            "which several hosts cannot do",
        )
    # Stated, because jax.make_mesh gives Explicit axes by default (jax 0.10.2), whose
    # shardings are part of every array's type.
    types = (AxisType.Auto,) * len(sizes)
    if devices is not None:
        # In the order they come in: jax.make_mesh wants whole tori, and a smaller mesh
        # takes the first devices.
        picked = np.array(devices[:wanted]).reshape(tuple(sizes.values()))
        return Mesh(picked, tuple(sizes), axis_types=types)
    devices = jax.devices()[:wanted]
    if (slices := count_slices(devices)) > 1:
        laid_out = over_slices(sizes, devices, slices, where=where)
        return Mesh(laid_out, tuple(sizes), axis_types=types)
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, tuple(sizes), axis_types=types, devices=devices)


def count_slices(devices: Sequence) -> int:
    """How many slices of TPUs these devices belong to.

    GPUs count their hosts by the same attribute. They are one slice here, in whose
    order of devices those of a host are neighbours already.
    """
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def over_slices(
    sizes: Mapping[str, int], devices: Sequence, slices: int, *, where: str | Argument
) -> np.ndarray:
    """The devices in the mesh's shape: the slices one after the other along `data`."""
    # The network between slices is slower by far: only `data`, whose sums of the
    # gradient it carries once a step, goes over it.
    if sizes["data"] % slices:
        others = " and ".join(axis for axis in sizes if axis != "data")
        raise UserError(
            where,
            f": {_shown(sizes)} on {slices} slices: data is not divisible by "
            f"{slices}, and {others} do not reach beyond a slice",
        )
    inner = {**sizes, "data": sizes["data"] // slices}
    outer = {**dict.fromkeys(sizes, 1), "data": slices}
    return mesh_utils.create_hybrid_device_mesh(
        tuple(inner.values()), tuple(outer.values()), devices
    )


def fit_mesh(
    sizes: Mapping[str, int], have: int, *, rows: int = 0, where: str | Argument
) -> dict[str, int]:
    """The size of every axis on so many devices; see make_mesh."""
    sizes = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    shown = _shown(sizes)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            where, f": {shown}: sizes are at least 1, and at most one is -1"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = max(have // fixed, 1)
    wanted = math.prod(sizes.values())
    # With a free axis all devices must be used: what is fixed has to divide them.
    if wanted > have or (free and wanted < have):
        raise UserError(where, f": {shown} does not fit onto {have} devices")
    # Rows that all devices cannot share evenly leave some of them idle, on one machine:
    # better than to refuse the run.
    if free and free[0] in RULES["batch"] and rows:
        most = sizes[free[0]]
        others = math.prod(sizes[axis] for axis in RULES["batch"]) // most
        fitting = [n for n in range(1, most + 1) if rows % (n * others) == 0]
        sizes[free[0]] = max(fitting, default=most)
    return sizes


def _shown(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items())


def parse_mesh(text: str) -> dict[str, int]:
    """'data=2,fsdp=4' of a --mesh flag as sizes; unnamed axes are 1."""
    return fields.parse_pairs(text, dict.fromkeys(MESH_AXES, 1), Argument("mesh"))


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def with_less_state(sizes: Mapping[str, int]) -> dict[str, int] | None:
    """Sizes with half the parameters and moments on a device; None where none halve."""
    if sizes["data"] % 2:
        return None
    return {**sizes, "data": sizes["data"] // 2, "fsdp": 2 * sizes["fsdp"]}


def check(config, mesh: Mesh) -> None:
    """Raises UserError where the rows of a batch cannot be split over this mesh."""
    train, shards = config.train, row_shards(mesh)
    if train.batch_size % (shards * train.micro_batches):
        over = _shown({axis: mesh.shape[axis] for axis in RULES["batch"]})
        raise UserError(
            f"config.train.batch_size={train.batch_size} is not divisible by "
            f"config.train.micro_batches={train.micro_batches} times the "
            f"{shards} row shards of config.mesh ({over})"
        )


# Names to shardings -------------------------------------------------------------------


def spec(
    shape: Sequence[int], names: Sequence[str | None], sizes: Mapping[str, int]
) -> PartitionSpec:
    """The rules applied to one array, for mesh axes of these sizes.

    What does not divide evenly stays whole: a vocabulary may have any size.
    """
    used: set[str] = set()
    parts = []
    for size, name in zip(shape, names, strict=True):
        axes = [a for a in RULES.get(name or "", ()) if a not in used]
        axes = [a for a in axes if sizes.get(a, 1) > 1]
        if size % math.prod(sizes[a] for a in axes):
            axes = []
        used.update(axes)
        parts.append(tuple(axes) or None)
    return PartitionSpec(*parts)


def free_axes() -> dict[str, int]:
    """The axes of the mesh around this that are the compiler's to split; their sizes.

    Others are split already: `data` is, where gradients are computed.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis: mesh.shape[axis] for axis, kind in types if kind == AxisType.Auto}


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Tells the compiler how an intermediate value is split; outside a mesh, nothing.

    Without it the compiler may split the model's width by `fsdp`, as the parameters
    are, and sum activations where it should have gathered weights.
    """
    free = free_axes()
    if math.prod(free.get(axis, 1) for axis in MESH_AXES) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, names, free))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _named(mesh: Mesh, shape, names) -> NamedSharding:
    return NamedSharding(mesh, spec(shape, names, mesh.shape))


def model_state(mesh: Mesh, state, axes):
    """Shardings of a model's state (or its shapes), by model.state_axes()."""
    structure = jax.tree.structure(state)
    names = structure.flatten_up_to(axes)
    leaves = structure.flatten_up_to(state)
    found = [_named(mesh, x.shape, n) for x, n in zip(leaves, names, strict=True)]
    return structure.unflatten(found)


def parameters(mesh: Mesh, params, axes):
    """Shardings of a model's parameters (or their shapes), by model.param_axes."""
    return jax.tree.map(lambda x, names: _named(mesh, x.shape, names), params, axes)


def train_state(mesh: Mesh, whole, model):
    """Of a TrainState, or of its shapes: moments lie where their parameter does.

    A leaf belongs to a parameter if its path ends with that of the parameter and the
    shapes are equal: so optax lays out moments, traces and averages.
    """
    found = parameters(mesh, whole.params, model.param_axes(whole.params))
    by_path = {
        _path(path): (x.shape, sharding)
        for (path, x), sharding in zip(
            jax.tree_util.tree_leaves_with_path(whole.params),
            jax.tree.leaves(found),
            strict=True,
        )
    }

    def place(path, x):
        path = _path(path)
        for start in range(len(path)):
            shape, sharding = by_path.get(path[start:], (None, None))
            # Under a parameter's path an optimizer may keep less than its shape.
            if shape == x.shape:
                return sharding
        return replicated(mesh)

    placed = jax.tree_util.tree_map_with_path(place, whole)
    rows = model_state(mesh, whole.carried, model.state_axes())
    return placed._replace(carried=rows)


def _path(path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def with_shardings(abstract, shardings):
    """jax.ShapeDtypeStructs that say where their arrays shall be."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        shardings,
    )


# Batches ------------------------------------------------------------------------------


class Rows:
    """The rows of a batch on a mesh: which are this process's, how they get there.

    Attributes:
      mine: ascending rows that the devices of this process hold. Processes that differ
        only in `tensor` hold the same ones.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        self.mesh, self.batch_size = mesh, batch_size
        sharding = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
        parts = sharding.addressable_devices_indices_map((batch_size,)).values()
        # A set, because devices that differ in `tensor` hold the same rows.
        found = {r for (part,) in parts for r in range(*part.indices(batch_size))}
        self.mine = np.array(sorted(found))

    def shardings(self, batch: Mapping, *, axis: int = 0) -> dict:
        """Shardings of a dict of arrays with the rows at `axis`; scalars are copied."""

        def place(x):
            if np.ndim(x) <= axis:
                return replicated(self.mesh)
            split = (None,) * axis + (RULES["batch"],)
            return NamedSharding(self.mesh, PartitionSpec(*split))

        return {name: place(x) for name, x in batch.items()}

    def put(self, batch: Mapping, *, axis: int = 0) -> Mapping:
        """Makes global arrays of what this process has made of its rows `mine`."""
        if jax.process_count() == 1:
            # jit splits what is whole on one host by itself.
            return batch
        shardings = self.shardings(batch, axis=axis)
        return {k: self._global(x, shardings[k], axis) for k, x in batch.items()}

    def _global(self, x, sharding, axis):
        x = np.asarray(x)
        if x.ndim <= axis:
            return jax.make_array_from_callback(x.shape, sharding, lambda _: x)
        shape = (*x.shape[:axis], self.batch_size, *x.shape[axis + 1 :])

        # JAX asks for global rows, and this host has made its own only.
        def local(index):
            start, stop, _ = index[axis].indices(self.batch_size)
            first = int(np.searchsorted(self.mine, start))
            here = (*index[:axis], slice(first, first + stop - start))
            return x[here]

        return jax.make_array_from_callback(shape, sharding, local)


def padded(rows: int, mesh: Mesh) -> int:
    """The least number from `rows` on that gives every device equally many."""
    shards = row_shards(mesh)
    return -(-rows // shards) * shards
