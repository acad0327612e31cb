"""Machines that are not here: which are known, what their compilers are asked."""

from types import SimpleNamespace

import jax
import pytest
from training_runs import refusal

from xlformer import sharding
from xlformer.machines import topologies


@pytest.fixture
def asked(monkeypatch):
    """What the compilers are asked; the devices here stand for theirs."""
    found = []

    def describe(name, **options):
        found.append((name, options))
        return SimpleNamespace(devices=jax.devices())

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", describe)
    return found


@pytest.mark.parametrize(
    ("name", "platform", "shape"),
    [
        ("v5e:2x4", "tpu", None),
        ("h100", "cuda", "1x1x1"),
        ("h100:8", "cuda", "1x1x8"),
        ("h200:24", "cuda", "3x1x8"),
    ],
)
def test_a_compiler_is_asked_in_its_own_words(asked, name, platform, shape):
    assert topologies.machine(name).devices == jax.devices()
    ((told, options),) = asked
    assert told == (name if platform == "tpu" else name.partition(":")[0])
    assert options["platform"] == platform and options.get("topology") == shape
    if platform == "cuda":
        assert f"NVIDIA {told.upper()}" in options["target_config"]


def test_the_mesh_takes_the_first_devices_or_all(asked):
    def make(**sizes):
        devices = topologies.machine("v5e:2x4").devices
        return sharding.make_mesh(sizes, devices=devices)

    mesh = make(data=2, tensor=2)
    assert (mesh.shape["data"], mesh.shape["tensor"], mesh.size) == (2, 2, 4)
    assert list(mesh.devices.flat) == jax.devices()[:4]
    assert make(data=-1, fsdp=2).shape["data"] == 4
    line = refusal(make, data=99)
    assert "data=99" in line and "8 devices" in line


@pytest.mark.parametrize(("name", "extra"), [("v6e:2x2", "tpu"), ("h100", "cuda12")])
def test_without_the_compiler_it_says_what_to_install(monkeypatch, name, extra):
    def missing(*_, **__):
        raise NotImplementedError("topology not implemented")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", missing)
    found = topologies.machine(name)
    assert found.devices is None and f"xlformer[{extra}]" in found.note
    assert topologies.machine(name, compiler=False).count == found.count


def test_what_the_compiler_refuses_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such slice\nmore")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", refuse)
    line = refusal(topologies.machine, "v5e:3x5")
    assert "v5e:3x5" in line and "no such slice" in line and "\n" not in line


@pytest.mark.parametrize("name", ["v7:2x2", "v5p:4x4", "v5e:4x0", "h100:x", "h100:12"])
def test_unknown_ones_are_refused(name):
    line = refusal(topologies.machine, name, compiler=False)
    assert f"topology={name!r}" in line
