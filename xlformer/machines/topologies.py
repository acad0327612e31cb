"""Machines that are not here, as their compilers know them: machine('v5e:2x4').

A TPU's compiler comes with `pip install 'xlformer[tpu]'`, that of NVIDIA's GPUs with
'xlformer[cuda12]'. Neither needs the machine itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
from jax.experimental import topologies

from xlformer.errors import Argument, UserError, reason

# How many numbers a shape has, as in v5p:4x4x4: TPUs are joined in a torus of 2 or 3
# dimensions, GPUs are only counted.
DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2, "h100": 1, "h200": 1}
GPUS = ("h100", "h200")
KNOWN = (
    "v5e:4x4, v6e:4x4, v5p:4x4x4 (any slice that exists), h100, h200:8 (up to 8, or "
    "hosts of 8), local"
)
# GPUs of one host, joined by NVLink; hosts are joined by a network.
HOST = 8

# What XLA would ask the GPU itself. The counts are NVIDIA's of compute capability 9.0,
# the sizes and rates those of each card.
# With them XLA compiles machine code without a GPU: matrix products, Pallas kernels and
# cuDNN attention were seen to (jax 0.10.2, CUDA 12).
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  cuda_compute_capability {{ major: 9 }}
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{kind}"
"""
_TARGETS = {
    "h100": _HOPPER.format(
        bandwidth=3352320000000, memory=84942979072, kind="NVIDIA H100 80GB HBM3"
    ),
    "h200": _HOPPER.format(
        bandwidth=4800000000000, memory=150754820096, kind="NVIDIA H200"
    ),
}


class Topology(NamedTuple):
    """A machine that may not be here.

    Attributes:
      chip: its name in chips.CHIPS.
      count: how many devices it has.
      devices: to compile for; None without the compiler.
      note: why there are none.
    """

    chip: str
    count: int
    devices: list | None
    note: str | None


def machine(topology: str, *, compiler: bool = True) -> Topology:
    """Reads 'v5p:4x4x4' or 'h100:8'. With compiler=False none is asked for.

    Raises UserError for an unknown one.
    """
    named = Argument("topology", topology)
    name, _, shape = topology.partition(":")
    counts = [int(n) for n in shape.split("x") if n.isdecimal()]
    if name in GPUS and not shape:
        counts, shape = [1], "1"
    # What is not read above must not be dropped in silence: '4x', '4x04', '4x4x'.
    exact = "x".join(map(str, counts)) == shape
    if len(counts) != DIMENSIONS.get(name) or not exact or 0 in counts:
        raise UserError(named, f" is unknown; known: {KNOWN}")
    count = math.prod(counts)
    # Beyond one host XLA is told of whole hosts.
    if name in GPUS and count > HOST and count % HOST:
        raise UserError(named, f": {count} GPUs are no hosts of {HOST}")
    if not compiler:
        return Topology(name, count, None, "no compiler was asked")
    extra, what = ("cuda12", "CUDA") if name in GPUS else ("tpu", "TPU")
    try:
        devices = _gpus(name, count) if name in GPUS else _tpus(topology)
    except jax.errors.JaxRuntimeError as error:
        line = reason(error)
        raise UserError(named, f": {line}; known: {KNOWN}") from error
    # Without libtpu or CUDA: it may also be NotImplementedError, which is one of these.
    except RuntimeError:
        note = f"the {what} compiler is not installed: pip install 'xlformer[{extra}]'"
        return Topology(name, count, None, note)
    return Topology(name, count, devices, None)


def _tpus(topology: str) -> list:
    return topologies.get_topology_desc(topology, platform="tpu").devices


def _gpus(name: str, count: int) -> list:
    here = min(count, HOST)
    return topologies.get_topology_desc(
        name,
        platform="cuda",
        topology=f"{count // here}x1x{here}",  # domains of NVLink, hosts, GPUs of each
        target_config=_TARGETS[name],
    ).devices
