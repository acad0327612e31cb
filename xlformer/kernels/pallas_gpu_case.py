"""How the fused GPU kernels of pallas_gpu.py cut a case, and what they refuse.

Everything here is known when a program is traced.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from xlformer.kernels.case import Case

# Queries of a tile, and keys. Compiled for an H100 (ptxas -v, head size 64, bfloat16)
# tiles of 64 need 80 KiB and 136 registers forward, 88 KiB and 252 backward, so two
# programs share a processor and one computes while the other waits. Tiles of 128 need
# 192 and 208 KiB and put 120 bytes of registers in memory; float32 does so from 64 on.
SIZES = {"bfloat16": (64, 32, 16), "float32": (32, 16)}
STAGES = 2  # Tiles of keys on their way at once.
H100_SHARED = 232_448  # bytes that one block may have; used where no GPU is asked.


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A case in tiles of Q queries and N keys, Q <= N, all powers of 2.

    A head's score (t, s) has the distance d = t + M - s. `Column` of a distance is
    T' + M - 1 - d, with T' = T rounded up to Q: ascending like the keys.
    """

    case: Case
    Q: int
    N: int
    warps: int

    @property
    def query_tiles(self) -> int:
        return -(-self.case.T // self.Q)

    @property
    def key_tiles(self) -> int:
        return -(-self.case.S // self.N)

    @property
    def columns(self) -> int:
        return self.query_tiles * self.Q + self.case.M

    def first_column(self, i0):
        """Of the last query of the tile from query i0 on, and key 0."""
        return self.query_tiles * self.Q - self.Q - i0

    def last_tile(self, i):
        """Last tile of keys that tile i of queries sees."""
        last = (i * self.Q + self.Q - 1 + self.case.M) // self.N
        return jnp.minimum(last, self.key_tiles - 1)

    def first_tiles(self, start_BT):
        """First one for each row and each tile of queries, [B or 1, query_tiles]."""
        i = jnp.arange(self.query_tiles, dtype=jnp.int32) * self.Q
        first = jnp.zeros((1, self.query_tiles), jnp.int32)
        if self.case.window is not None:
            first = jnp.maximum(first, (i + self.case.M - self.case.window)[None])
        if start_BT is not None:
            first = jnp.maximum(first, start_BT[:, :: self.Q])
        return jnp.minimum(first, (i + self.case.M)[None]) // self.N

    def query_range(self, n):
        """Tiles of queries that may see tile n of keys: first, one past the last."""
        first = jnp.maximum(n * self.N - self.case.M, 0) // self.Q
        if self.case.window is None:
            return first, self.query_tiles
        last = (n * self.N + self.N - 1 - self.case.M + self.case.window) // self.Q
        return first, jnp.minimum(last + 1, self.query_tiles)


def padded(width: int | None) -> int:
    """Width of a tile's rows: a power of 2, and 16 at least for the matrix units."""
    return max(16, 1 << ((width or 1) - 1).bit_length())


def shared_bytes(case: Case, Q: int, N: int) -> int:
    """Of the largest kernel, backward_queries; more than it needs in float32."""
    size = 2 if case.dtype == "bfloat16" else 4
    widths = [case.K, case.V] + ([] if case.R is None else [case.R])
    stays_and_streams = (Q + STAGES * N) * sum(map(padded, widths))
    return size * stays_and_streams + 4 * Q * N


def tiles(case: Case) -> Tiles | None:
    """The largest tiles that the GPU's shared memory holds; None if none do."""
    if case.interpret:
        return Tiles(case, *case.tiles, warps=4)
    limit = shared_memory()
    for size in SIZES[case.dtype]:
        too_large = size > 16 and size >= 2 * case.T
        if not too_large and shared_bytes(case, size, size) <= limit:
            # With 4 warps a head size of 128 would put registers in memory.
            wide = max(case.K, case.V, case.R or 0) > 64 and size == 64
            return Tiles(case, size, size, 8 if wide else 4)
    return None


def shared_memory() -> int:
    """Bytes for one block on the first GPU here, else on an H100."""
    if jax.default_backend() != "gpu":
        return H100_SHARED
    device = jax.local_devices()[0]
    return getattr(device, "shared_memory_per_block_optin", H100_SHARED)


def refusal(case: Case, platform: str) -> str | None:
    """Why these kernels cannot run this, in one line; None if they can."""
    if platform != "gpu" and not case.interpret:
        return f"needs an NVIDIA GPU, this is {platform}: set 'auto' or 'blocked'"
    if not case.causal:
        return "knows only causal attention: set 'auto' or 'blocked'"
    if case.dtype not in ("float32", "bfloat16"):
        return f"knows float32 and bfloat16, not dtype={case.dtype}"
    if tiles(case) is None:
        least = shared_bytes(case, SIZES[case.dtype][-1], SIZES[case.dtype][-1])
        return (
            f"its least tiles with d_head={case.K} in {case.dtype} need "
            f"{least >> 10} KiB of shared memory, this GPU has "
            f"{shared_memory() >> 10}: set 'blocked'"
        )
    return None
