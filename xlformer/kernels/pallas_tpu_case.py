"""How the fused TPU kernels of pallas_tpu.py cut a case, and what they refuse.

Everything here is known when a program is traced.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from xlformer.kernels.case import Case

# Large tiles: a step of the grid costs about 0.35 us whatever is in it (Pallas guide),
# in which a v5e could multiply 69 MFLOP; a tile like this has 50 at head size 64.
MOST_QUERIES, MOST_KEYS = 256, 512
# Of the fast memory (VMEM) of the chips from v5e on, 64 MiB at least. v4 has 16, and no
# strided rotation either: there the kernels do not compile.
MOST_BYTES = 48 << 20


@dataclasses.dataclass(frozen=True)
class Tiles(Case):
    """A case in tiles of Q queries and N keys, Q <= N."""

    @classmethod
    def cut(cls, case: Case) -> Tiles:
        return cls(**vars(case))

    @property
    def Q(self) -> int:
        return self.tiles[0] if self.tiles else _tile(self.T, 128, MOST_QUERIES)

    @property
    def N(self) -> int:
        return self.tiles[1] if self.tiles else _tile(self.S, self.Q, MOST_KEYS)

    @property
    def Tp(self) -> int:
        return -(-self.T // self.Q) * self.Q

    @property
    def Sp(self) -> int:
        return -(-self.S // self.N) * self.N

    @property
    def query_tiles(self) -> int:
        return self.Tp // self.Q

    @property
    def step(self) -> int:
        """Divides the first row of each tile's part of the table."""
        return math.gcd(self.Q, self.N)

    def last_tile(self, q):
        """Last tile of keys that tile q of queries sees."""
        last = (q * self.Q + self.Q - 1 + self.M) // self.N
        return jnp.minimum(last, self.Sp // self.N - 1)

    def first_tiles(self, start_BT):
        """First one, for each row and each tile of queries, [B * query_tiles]."""
        i = jnp.arange(self.query_tiles, dtype=jnp.int32) * self.Q
        first = jnp.zeros((1, self.query_tiles), jnp.int32)
        if self.window is not None:
            first = jnp.maximum(first, (i + self.M - self.window)[None])
        if start_BT is not None:
            first = jnp.maximum(first, start_BT[:, :: self.Q])
        return jnp.minimum(first, (i + self.M)[None]) // self.N

    def vmem_bytes(self) -> int:
        """An upper estimate for the backward kernel, which is the larger one."""
        size = 2 if self.dtype == "bfloat16" else 4
        K, V, R = (-(-(width or 0) // 128) * 128 for width in (self.K, self.V, self.R))
        queries = self.Q * (2 * K + 2 * V + 2 * R)
        keys = self.N * (K + V)
        whole = self.Sp * (K + V)
        table = (self.Tp + self.Sp) * R
        streams = 2 * size * (queries + keys + whole + table) + 2 * 4 * table
        scratch = 4 * (whole + self.Q * (K + R + 3 * 128))
        work = 4 * self.Q * (self.Q + self.N) * 8
        return streams + scratch + work


def _tile(n, least, most):
    """The multiple of 128 that pads n least; the largest of equals."""
    sizes = range(most, least - 1, -128)
    return min(sizes, key=lambda size: -(-n // size) * size)


def refusal(case: Case, platform: str) -> str | None:
    """Why this kernel cannot run this, in one line; None if it can."""
    if platform != "tpu" and not case.interpret:
        return f"needs a TPU, this is {platform}: set 'auto' or 'blocked'"
    if not case.causal:
        return "knows only causal attention: set 'auto' or 'blocked'"
    if case.dtype not in ("float32", "bfloat16"):
        return f"knows float32 and bfloat16, not dtype={case.dtype}"
    needed = Tiles.cut(case).vmem_bytes()
    if needed > MOST_BYTES:
        return (
            f"its tiles of {case.S} keys with d_head={case.K} in {case.dtype} need "
            f"{needed >> 20} MiB of fast memory, it has "
            f"{MOST_BYTES >> 20}: shorten memory_length, or set 'blocked'"
        )
    return None
