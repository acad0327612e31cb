"""Datasheets: what each kind of accelerator can do at most."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """One device, as JAX counts them.

    Attributes:
      kinds: its jax.Device.device_kind, each as a whole: 'NVIDIA L4' begins 'NVIDIA
        L40S', and a part of a card (MIG) is named by the card and more.
      flops: dense bfloat16, summed in float32, a second.
      memory: bytes that a program may use.
      bandwidth: of that memory, bytes a second.
      link: bytes a second that it can send to its neighbours, all links together.
      source: where the numbers stand.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: int
    bandwidth: float
    link: float
    source: str


def _tpu(page, kinds, tflops, gib, bandwidth, link) -> Chip:
    source = f"cloud.google.com/tpu/docs/{page}; memory: what its compiler has"
    memory = int(gib * 2**30)
    return Chip(kinds, tflops * 1e12, memory, bandwidth * 1e9, link * 1e9, source)


def _gpu(source, kind, tflops, gb, bandwidth, link) -> Chip:
    source = f"NVIDIA's {source}, without sparsity"
    return Chip((kind,), tflops * 1e12, gb * 10**9, bandwidth * 1e9, link * 1e9, source)


# The datasheets of GeForce cards have no bfloat16. The whitepapers of the architectures
# have, in the table at their end: summed in float32, half of what they sum in float16.
_A100, _H100 = "datasheet of the A100", "datasheet of the H100 SXM"
_GA102 = "whitepaper of the Ampere GA102 architecture"
_ADA, _BLACKWELL = "whitepaper of the Ada architecture", "whitepaper of RTX Blackwell"
# GB/s of 16 lanes, one way: what links cards that have no NVLink.
_PCIE4, _PCIE5 = 32, 64

# Columns: source, kinds, 10^12 operations/s, memory, GB/s of it, GB/s of all links.
# Google and NVIDIA state links in both directions together: half of that can be sent.
CHIPS = {
    # v4 has two cores of 15.25 GiB, which are one device, and six links of 50 GB/s
    # (Jouppi et al. 2023, arXiv:2304.01433).
    "v4": _tpu("v4", ("TPU v4",), 275, 30.5, 1200, 300),
    "v5e": _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197, 15.75, 819, 200),
    "v5p": _tpu("v5p", ("TPU v5", "TPU v5p"), 459, 95.74, 2765, 600),
    "v6e": _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918, 31.25, 1600, 400),
    "a100": _gpu(_A100, "NVIDIA A100-SXM4-40GB", 312, 40, 1555, 300),
    "a100-80": _gpu(_A100, "NVIDIA A100-SXM4-80GB", 312, 80, 2039, 300),
    "a100-pcie": _gpu(_A100, "NVIDIA A100 80GB PCIe", 312, 80, 1935, _PCIE4),
    "h100": _gpu(_H100, "NVIDIA H100 80GB HBM3", 989, 80, 3350, 450),
    "h200": _gpu("datasheet of the H200 SXM", "NVIDIA H200", 989, 141, 4800, 450),
    "l4": _gpu("datasheet of the L4", "NVIDIA L4", 121, 24, 300, _PCIE4),
    "l40s": _gpu("datasheet of the L40S", "NVIDIA L40S", 362, 48, 864, _PCIE4),
    "rtx3090": _gpu(_GA102, "NVIDIA GeForce RTX 3090", 71, 24, 936, _PCIE4),
    "rtx4090": _gpu(_ADA, "NVIDIA GeForce RTX 4090", 165.2, 24, 1008, _PCIE4),
    "rtx5090": _gpu(_BLACKWELL, "NVIDIA GeForce RTX 5090", 209.5, 32, 1792, _PCIE5),
    "rtxa6000": _gpu(_GA102, "NVIDIA RTX A6000", 154.8, 48, 768, _PCIE4),
    "rtx6000ada": _gpu(_ADA, "NVIDIA RTX 6000 Ada Generation", 364.2, 48, 960, _PCIE4),
}


def of_kind(kind: str) -> Chip | None:
    """The datasheet of a jax.Device.device_kind; None where it is not known."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
