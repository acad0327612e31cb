"""Datasheets: what each kind of accelerator can do at most."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """One device, as JAX counts them.

    Attributes:
      kind: the beginning of its jax.Device.device_kind.
      flops: dense bfloat16, a second.
      memory: bytes that a program may use.
      bandwidth: of that memory, bytes a second.
      link: bytes a second that it can send to its neighbours, all links together.
      source: where the numbers stand.
    """

    kind: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    source: str


_TPU = "cloud.google.com/tpu/docs/{}; memory: what its compiler says is available"
_NVIDIA = "NVIDIA's datasheet of the {} SXM, without sparsity"
# Google states the links of both directions together: half of that can be sent.
CHIPS = {
    "v5e": Chip(
        "TPU v5 lite", 197e12, int(15.75 * 2**30), 819e9, 200e9, _TPU.format("v5e")
    ),
    "v5p": Chip(
        "TPU v5", 459e12, int(95.74 * 2**30), 2765e9, 600e9, _TPU.format("v5p")
    ),
    "v6e": Chip(
        "TPU v6 lite", 918e12, int(31.25 * 2**30), 1600e9, 400e9, _TPU.format("v6e")
    ),
    "h100": Chip(
        "NVIDIA H100", 989e12, 80 * 10**9, 3.35e12, 450e9, _NVIDIA.format("H100")
    ),
    "h200": Chip(
        "NVIDIA H200", 989e12, 141 * 10**9, 4.8e12, 450e9, _NVIDIA.format("H200")
    ),
}


def of_kind(kind: str) -> Chip | None:
    """The datasheet of a jax.Device.device_kind; None where it is not known."""
    # 'TPU v5 lite' begins with 'TPU v5': the longest name that fits is meant.
    fitting = [c for c in CHIPS.values() if kind.startswith(c.kind)]
    return max(fitting, key=lambda c: len(c.kind), default=None)
