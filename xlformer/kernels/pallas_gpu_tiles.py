"""How the fused GPU kernels of pallas_gpu.py cut a call, and what they refuse.

Everything here is known when a program is traced.
"""

from __future__ import annotations

import dataclasses

import jax

from xlformer.kernels.call import Call, Tiles

# Queries of a tile, and keys. Compiled for an H100 (ptxas -v, head size 64, bfloat16)
# tiles of 64 need 80 KiB and 136 registers forward, 88 KiB and 252 backward, so two
# programs share a processor and one computes while the other waits. Tiles of 128 need
# 192 and 208 KiB and put 120 bytes of registers in memory; float32 does so from 64 on.
SIZES = {"bfloat16": (64, 32, 16), "float32": (32, 16)}
# Tiles of keys that are on their way from memory at once: each costs shared memory.
STAGES = 2
# Bytes that one block may have on an H100, used where there is no GPU to be asked.
H100_SHARED = 232_448


@dataclasses.dataclass(frozen=True)
class GPUTiles(Tiles):
    """Q and N are powers of 2.

    A head's score (t, s) has the distance d = t + M - s. `Column` of a distance is
    T' + M - 1 - d, with T' = T rounded up to Q: ascending like the keys.
    """

    warps: int

    @property
    def columns(self) -> int:
        return self.query_tiles * self.Q + self.call.M

    def first_column(self, i0):
        """The column of key 0 for the last query of the tile from query i0 on."""
        return self.query_tiles * self.Q - self.Q - i0


def padded(width: int | None) -> int:
    """Width of a tile's rows: a power of 2, and 16 at least for the matrix units."""
    return max(16, 1 << ((width or 1) - 1).bit_length())


def shared_bytes(call: Call, Q: int, N: int) -> int:
    """What the largest kernel, backward_queries, needs; less than this in float32."""
    size = 2 if call.dtype == "bfloat16" else 4
    widths = [call.K, call.V] + ([] if call.R is None else [call.R])
    # Queries stay; keys, values and distances stream, STAGES tiles at once. Added is
    # one tile of scores in float32.
    stays_and_streams = (Q + STAGES * N) * sum(map(padded, widths))
    return size * stays_and_streams + 4 * Q * N


def cut(call: Call) -> GPUTiles | None:
    """The largest tiles that the GPU's shared memory holds; None if none do."""
    if call.interpret:
        return GPUTiles(call, *call.test_tiles, warps=4)
    limit = shared_memory()
    for size in SIZES[call.dtype]:
        # At least half of such a tile would be padding; 16 is what a matrix unit takes.
        too_large = size > 16 and size >= 2 * call.T
        if not too_large and shared_bytes(call, size, size) <= limit:
            # With 4 warps a head size of 128 would put registers in memory.
            wide = max(call.K, call.V, call.R or 0) > 64 and size == 64
            return GPUTiles(call, size, size, 8 if wide else 4)
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
        least = shared_bytes(call, SIZES[call.dtype][-1], SIZES[call.dtype][-1])
        return (
            f"its least tiles with d_head={call.K} in {call.dtype} need "
            f"{least >> 10} KiB of shared memory, this GPU has "
            f"{shared_memory() >> 10}: set 'blocked'"
        )
    return None
