"""How the fused GPU kernels of pallas_gpu.py cut a call, and what they refuse.

Everything here is known when a program is traced.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from xlformer.kernels.call import Call, Tiles


class Size(NamedTuple):
    """Queries and keys of a tile, and how many tiles of keys are on their way at once.

    Each of those costs shared memory.
    """

    Q: int
    N: int
    stages: int = 2


# Bytes that one block may have on an H100, used where there is no GPU to be asked.
H100_SHARED = 232_448


@dataclasses.dataclass(frozen=True)
class GPUTiles(Tiles):
    """Q and N are powers of 2.

    A head's score (t, s) has the distance d = t + M - s. `Column` of a distance is
    T' + M - 1 - d, with T' = T rounded up to Q: ascending like the keys.
    """

    stages: int
    warps: int = 4

    @property
    def columns(self) -> int:
        return self.query_tiles * self.Q + self.call.M

    def first_column(self, i0):
        """The column of key 0 for the last query of the tile from query i0 on."""
        return self.query_tiles * self.Q - self.Q - i0


def padded(width: int | None) -> int:
    """Width of a tile's rows: a power of 2, and 16 at least for the matrix units."""
    return max(16, 1 << ((width or 1) - 1).bit_length())


def sizes(call: Call, *, forward: bool) -> tuple[Size, ...]:
    """Tiles of the forward or of the backward kernels, the fastest on an H100 first.

    With heads of 64 and 22 rows of 512 queries and 1,024 keys in bfloat16 the forward
    kernel takes 0.33 ms, and 0.47 with tiles of 64 keys; with heads of 128 and 16 rows
    of 768 and 1,536 it takes 0.66, and 0.81 with two stages. 8 warps take longer
    everywhere, and so do tiles of 128 queries (tests/speed/gpu_tiles.py, jax 0.11.2,
    2026-11-26). float32 puts registers in memory from 64 on.
    """
    small = Size(32, 32), Size(16, 16)
    if call.dtype == "float32":
        return small
    if max(call.K, call.V, call.R or 0) > 64:
        return Size(64, 64, 1), *small
    return Size(64, 128, 1) if forward else Size(64, 64, 3), Size(64, 64), *small


def shared_bytes(call: Call, size: Size) -> int:
    """What the largest kernel, backward_queries, needs; less than this in float32."""
    itemsize = 2 if call.dtype == "bfloat16" else 4
    widths = [call.K, call.V] + ([] if call.R is None else [call.R])
    # Queries stay; keys, values and distances stream. Added is one tile of scores in
    # float32.
    stays_and_streams = (size.Q + size.stages * size.N) * sum(map(padded, widths))
    return itemsize * stays_and_streams + 4 * size.Q * size.N


def cut(call: Call, *, forward: bool = True) -> GPUTiles | None:
    """The first tiles that the GPU's shared memory holds; None if none do."""
    if call.interpret:
        return GPUTiles(call, *call.test_tiles, stages=2)
    limit = shared_memory()
    for size in sizes(call, forward=forward):
        # At least half of such a tile would be padding; 16 is what a matrix unit takes.
        too_large = size.Q > 16 and (size.Q >= 2 * call.T or size.N >= 2 * call.S)
        if not too_large and shared_bytes(call, size) <= limit:
            return GPUTiles(call, *size)
    return None


def shared_memory() -> int:
    """Bytes for one block on the first GPU here, else on an H100."""
    if jax.default_backend() != "gpu":
        return H100_SHARED
    device = jax.local_devices()[0]
    return getattr(device, "shared_memory_per_block_optin", H100_SHARED)


def refusal(call: Call, platform: str) -> str | None:
    """Why these kernels cannot run this, in one line; None if they can."""
    if platform != "gpu" and not call.interpret:
        return f"needs an NVIDIA GPU, this is {platform}: set 'auto' or 'blocked'"
    if not call.visibility.causal:
        return "knows only causal attention: set 'auto' or 'blocked'"
    if call.dtype not in ("float32", "bfloat16"):
        return f"knows float32 and bfloat16, not dtype={call.dtype}"
    if cut(call) is None:
        least = shared_bytes(call, sizes(call, forward=True)[-1])
        return (
            f"its least tiles with d_head={call.K} in {call.dtype} need "
            f"{least >> 10} KiB of shared memory, this GPU has "
            f"{shared_memory() >> 10}: set 'blocked'"
        )
    return None
