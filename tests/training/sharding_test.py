"""Any mesh gives the numbers of a single device, and wastes no traffic."""

import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from training_runs import assert_close, bag, blanks, refusal

from xlformer import config as config_lib
from xlformer import models, sharding
from xlformer.data.stream import Stream
from xlformer.train import train
from xlformer.training.compiling import TrainingStep

V, B, T, M = 24, 8, 7, 11  # no other array has an axis of M
TOKENS = np.random.default_rng(0).integers(0, V, 1009).astype(np.uint8)
MESHES = {
    "one": {"data": 1},
    "data 8": {"data": 8},
    "data 2 x fsdp 4": {"data": 2, "fsdp": 4},
    "data 2 x tensor 4": {"data": 2, "tensor": 4},
    "2 x 2 x 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data 4": {"data": 4, "tensor": 1},
}
ALL = list(MESHES)[1:5]  # of the eight devices
MODELS = {
    "unrolled": {"dropout": 0.1, "attention_dropout": 0.1},
    "scanned, adaptive": {"scan_layers": True, "cutoffs": (8, 16), "div_val": 2},
    "remat, learned": {"remat": "full", "attn_type": 1, "table_length": 12},
    "gated": {"scan_layers": True, "gate": "gru", "dropout": 0.1},
    "learned absolute": {
        "attn_type": 3,
        "table_length": 12,
        "allow_incoherent_positions": True,
    },
}


def make_config(micro_batches=1, **fields):
    config = config_lib.load("quickstart:debug")
    sizes = {"n_layer": 2, "d_model": 16, "n_head": 4, "d_head": 4, "d_inner": 32}
    if fields.get("div_val"):
        fields["tie_projections"] = (False, True, True)
    config.model.update(memory_length=M, **sizes, **fields)
    config.train.update(batch_size=B, segment_length=T, ema_decay=0.5)
    config.train.micro_batches = micro_batches
    config.optimizer.update(learning_rate=0.01, schedule="constant", warmup_steps=0)
    config.optimizer.epsilon = 1e-3  # or Adam divides one rounding error by another
    return config


class Trainer:
    """Three steps on a mesh, parameters born where they stay, or copied from `before`.

    text: of the compiled step. after: the state and the metrics.
    """

    def __init__(self, config, mesh, model=None, before=None):
        mesh = sharding.make_mesh(mesh)
        model = model or models.build(config.model, vocab_size=V)
        made = TrainingStep(config, model, mesh)
        stream = Stream(TOKENS, batch_size=B, segment_length=T)
        with jax.set_mesh(mesh):
            if before is None:
                create = jax.jit(made.create, out_shardings=made.placed)
                self.state = create(jax.random.key(5))
                self.before = jax.device_get(self.state)
            else:
                self.state = jax.device_put(before, made.placed)
            step = made.compile(stream.at(0))
            self.text = step.as_text()
            for k in range(3):
                self.state, metrics = step(self.state, stream.at(k))
                metrics["train/loss_nats"].block_until_ready()
        self.after = jax.device_get((self.state, metrics))


@functools.cache
def trainer(name, micro_batches, mesh):
    copied = mesh not in ("one", "2 x 2 x 2")
    before = trainer(name, 1, "one").before if copied else None
    config = make_config(micro_batches, **MODELS[name])
    return Trainer(config, MESHES[mesh], before=before)


@pytest.mark.parametrize(
    ("name", "micro_batches", "mesh"),
    [
        *(("unrolled", 1, mesh) for mesh in ALL),
        ("unrolled", 2, "2 x 2 x 2"),
        ("scanned, adaptive", 1, "2 x 2 x 2"),
        ("remat, learned", 1, "data 2 x tensor 4"),
        ("gated", 1, "2 x 2 x 2"),
        ("learned absolute", 1, "2 x 2 x 2"),
    ],
)
def test_any_mesh_gives_the_numbers_of_one_device(name, micro_batches, mesh):
    found = trainer(name, micro_batches, mesh).after
    expected = trainer(name, 1, "one").after
    assert_close(found, expected, rtol=1e-5, atol=2e-6)


# Traffic ------------------------------------------------------------------------------

COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def collectives(trainer):
    """(kind, [shapes]) of each in the compiled step."""
    found = [COLLECTIVE.search(line) for line in trainer.text.splitlines()]
    return [
        (m[2], [tuple(map(int, filter(None, s.split(",")))) for s in
                re.findall(r"\w\d+\[([\d,]*)\]", m[1])])
        for m in found
        if m
    ]  # fmt: skip


@pytest.mark.parametrize(("micro_batches", "mesh"), [(1, "data 8"), (2, "data 4")])
def test_data_parallel_traffic_is_one_sum_of_the_gradient(micro_batches, mesh):
    made = trainer("unrolled", micro_batches, mesh)
    found = collectives(made)
    assert {kind for kind, _ in found} == {"all-reduce"}
    moved = sum(math.prod(shape) for _, shapes in found for shape in shapes)
    gradient = sum(x.size for x in jax.tree.leaves(made.state.params))
    assert moved == gradient + 1  # and the loss


@pytest.mark.parametrize("mesh", ALL)
def test_the_memory_is_never_moved(mesh):
    made = trainer("unrolled", 1, mesh)
    assert not [s for _, shapes in collectives(made) for s in shapes if M in s]
    placed = made.state.carried.hidden_LBMD.sharding
    split = MESHES[mesh]["data"] * MESHES[mesh].get("fsdp", 1)
    assert placed.shard_shape((2, B, M, 16)) == (2, B // split, M, 16)


def test_parameters_and_moments_are_split_by_the_rules():
    made = trainer("unrolled", 1, "2 x 2 x 2").state
    params, opt_state = made.params, made.opt_state
    layers = params["trunk"]["layers"]
    expected = {
        "qkv": (layers["attention"]["qkv"], P(None, "fsdp", None, "tensor", None)),
        "output": (layers["attention"]["output"], P(None, "tensor", None, "fsdp")),
        "in": (layers["feed_forward"]["in_kernel"], P(None, "fsdp", "tensor")),
        "table": (params["embedding"]["table"], P("tensor", "fsdp")),
        "norm": (layers["norm"]["scale"], P()),
    }
    for leaf, spec in expected.values():
        wanted = jax.sharding.NamedSharding(leaf.sharding.mesh, spec)
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    for moments in (opt_state[1].mu, opt_state[1].nu, made.ema):
        for x, y in zip(jax.tree.leaves(moments), jax.tree.leaves(params), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_a_model_without_names_is_copied_and_its_rows_are_split():
    config = make_config()
    config.train.ema_decay = 0.0
    found = Trainer(config, MESHES["data 2 x fsdp 4"], bag(vocab_size=V))
    assert found.state.params["table_VV"].sharding.is_fully_replicated
    assert found.state.carried["seen_VB"].sharding.spec == P(None, ("data", "fsdp"))
    one = Trainer(config, MESHES["one"], bag(vocab_size=V))
    a, b = found.after[0].params, one.after[0].params
    np.testing.assert_allclose(a["table_VV"], b["table_VV"], rtol=1e-5, atol=1e-6)


def test_what_is_hidden_does_not_depend_on_the_mesh():
    """Nor do the losses: devices hide different numbers of symbols."""
    config = make_config()
    config.train.update(ema_decay=0.0, objective="masked")
    mesh, one = (Trainer(config, MESHES[m], blanks(V + 1)) for m in ("data 8", "one"))
    a, b = mesh.after, one.after
    np.testing.assert_allclose(a[1]["train/loss_nats"], b[1]["train/loss_nats"], 1e-5)
    for name, x in b[0].params.items():
        np.testing.assert_allclose(a[0].params[name], x, rtol=1e-5, atol=1e-6)


# What does not fit --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "fragments"),
    [
        ({"data": 3, "fsdp": 4}, ["data=3", "fsdp=4", "8 devices"]),
        ({"data": -1, "tensor": 3}, ["data=-1", "tensor=3", "8 devices"]),
        ({"data": -1, "fsdp": -1}, ["data=-1", "fsdp=-1", "at most one"]),
        ({"data": 0}, ["data=0", "at least 1"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(sizes, fragments):
    line = refusal(sharding.make_mesh, sizes)
    assert line.startswith("config.mesh: ")
    assert all(fragment in line for fragment in fragments), line


def test_a_batch_and_heads_that_do_not_fit_are_one_line(tmp_path):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    line = refusal(sharding.check, make_config(micro_batches=4), mesh)
    assert "batch_size=8" in line and "micro_batches=4" in line and "4 row" in line
    config = make_config()
    config.model.n_head = 3
    config.mesh.update(data=1, tensor=2)
    config.data.corpus = "text"  # without a path: nothing has asked for it yet
    line = refusal(train, config, tmp_path)
    assert "n_head=3" in line and "config.mesh.tensor=2" in line


def test_sizes_of_a_flag():
    assert sharding.parse_mesh("data=2,tensor=4") == {"data": 2, "tensor": 4}
    assert sharding.make_mesh({"tensor": 2, "data": -1}).shape["data"] == 4
    assert "mesh: unknown argument 'rows'" in refusal(sharding.parse_mesh, "rows=2")


def test_an_axis_of_the_rows_takes_no_more_devices_than_divide_the_rows():
    assert sharding.make_mesh({"data": -1}, rows=12).shape["data"] == 6
    assert sharding.make_mesh({"data": -1, "fsdp": 2}, rows=12).shape["data"] == 3
    assert sharding.make_mesh({"data": -1, "tensor": 2}, rows=7).shape["data"] == 1
    assert sharding.make_mesh({"data": -1, "fsdp": 2}, rows=7).shape["data"] == 4
    assert sharding.make_mesh({"data": 2, "fsdp": -1}, rows=12).shape["fsdp"] == 3


def test_config_flag_and_mesh_have_the_axes_of_the_table():
    mesh = sharding.make_mesh({"data": 1})
    assert mesh.axis_names == tuple(sharding.MESH_AXES)
    for config in (config_lib.default_config(), config_lib.load("quickstart:debug")):
        assert set(config.mesh) == set(sharding.MESH_AXES)
    assert set(config.mesh.values()) == {1}  # a batch of two has no more
    assert all(name in sharding.MESH_HELP for name in sharding.MESH_AXES)
    split = {axis for axes in sharding.RULES.values() for axis in axes}
    assert split == set(sharding.MESH_AXES)  # one that splits nothing does nothing


def slices_of(count, platform="tpu", kind="TPU v5 lite"):
    """Devices of `count` 2x2 slices as the runtime describes them, last slice first."""

    def device(number):
        place, slice_index = number % 4, count - 1 - number // 4
        coords = (place % 2, place // 2, 0)
        return SimpleNamespace(
            **{"id": number, "platform": platform, "device_kind": kind},
            **{"coords": coords, "core_on_chip": 0, "slice_index": slice_index},
            **{"process_index": number // 4, "client": None},
        )

    return [device(number) for number in range(4 * count)]


@pytest.mark.parametrize("sizes", [{"data": -1}, {"data": 6, "fsdp": 2}])
def test_only_data_reaches_beyond_a_slice(monkeypatch, sizes):
    devices = slices_of(3)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: len(devices))
    monkeypatch.setattr(sharding, "Mesh", lambda devices, *_, **__: devices)
    found = sharding.make_mesh(sizes)
    of_slice = np.vectorize(lambda device: device.slice_index)(found)
    rows = len(of_slice) // 3
    assert of_slice.shape[0] == 3 * rows and found.size == 12
    for slice_index in range(3):
        assert (of_slice[slice_index * rows :][:rows] == slice_index).all()
    line = refusal(sharding.make_mesh, {"data": 4, "fsdp": 3})
    assert "data=4 x fsdp=3" in line and "3 slices" in line


def test_hosts_of_gpus_are_no_slices():
    """The runtime numbers them alike; fsdp over two hosts of 4 is allowed."""
    assert sharding.count_slices(slices_of(2)) == 2
    gpus = slices_of(2, platform="gpu", kind="NVIDIA H100 80GB HBM3")
    assert sharding.count_slices(gpus) == 1
    assert sharding.count_slices(jax.devices()) == 1


def test_rows_of_a_process_come_in_order():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rows = sharding.Rows(mesh, B)
    np.testing.assert_array_equal(rows.mine, np.arange(B))
    assert sharding.padded(5, mesh) == 8 and sharding.padded(8, mesh) == 8
    x_NBT = np.arange(3 * B * 2).reshape(3, B, 2)
    placed = rows._global(x_NBT, rows.shardings({"x": x_NBT}, axis=1)["x"], 1)
    np.testing.assert_array_equal(placed, x_NBT)
    assert placed.addressable_shards[0].data.shape == (3, 2, 2)
    assert int(rows._global(jnp.int32(7), sharding.replicated(mesh), 1)) == 7
