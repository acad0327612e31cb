"""What the fused kernels of pallas_tpu.py depend on: shapes, tiles, whether they can.

Everything here is known when a program is traced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math

import jax.numpy as jnp

# Large tiles: a step of the grid costs about 0.35 us whatever is in it (Pallas guide),
# in which a v5e could multiply 69 MFLOP; a tile like this has 50 at head size 64.
MOST_QUERIES, MOST_KEYS = 256, 512
# Of the fast memory (VMEM) of the chips from v5e on, 64 MiB at least. v4 has 16, and no
# strided rotation either: there the kernels do not compile.
MOST_BYTES = 48 << 20
_TEST_TILES: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """All that the choice of an implementation depends on, and the kernels' shapes.

    Attributes:
      K, V, R: widths of a key, of a value and of a distance's row (None without).
      rate: of dropout.
      starts: whether each query says which key it sees first.
      Q, N: queries and keys of a tile; Q <= N.
      interpret: as plain operations, on any device (tests).
    """

    T: int
    S: int
    K: int
    V: int
    R: int | None
    window: int | None
    rate: float
    dtype: str
    starts: bool
    causal: bool
    Q: int
    N: int
    interpret: bool

    @classmethod
    def of(cls, qu_BTHK, k_BSHK, v_BSHK, r_SHK, *, key_start_BT, **options) -> Case:
        """From the arguments of the operation, or their shapes."""
        T, S = qu_BTHK.shape[1], k_BSHK.shape[1]
        Q, N = _TEST_TILES or (_tile(T, 128, MOST_QUERIES), 0)
        N = N or _tile(S, Q, MOST_KEYS)
        return cls(
            T=T,
            S=S,
            K=k_BSHK.shape[-1],
            V=v_BSHK.shape[-1],
            R=None if r_SHK is None else r_SHK.shape[-1],
            dtype=jnp.dtype(qu_BTHK.dtype).name,
            starts=key_start_BT is not None,
            Q=Q,
            N=N,
            interpret=_TEST_TILES is not None,
            **options,
        )

    @property
    def M(self) -> int:
        return self.S - self.T

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


@contextlib.contextmanager
def interpreted(*, query_tile: int, key_tile: int):
    """What is traced inside runs on any device, slowly, and with tiles of any size."""
    global _TEST_TILES
    before, _TEST_TILES = _TEST_TILES, (query_tile, key_tile)
    try:
        yield
    finally:
        _TEST_TILES = before


def refusal(case: Case, platform: str) -> str | None:
    """Why this kernel cannot run this, in one line; None if it can."""
    if platform != "tpu" and not case.interpret:
        return f"needs a TPU, this is {platform}: set 'auto' or 'blocked'"
    if not case.causal:
        return "knows only causal attention: set 'auto' or 'blocked'"
    if case.dtype not in ("float32", "bfloat16"):
        return f"knows float32 and bfloat16, not dtype={case.dtype}"
    if case.vmem_bytes() > MOST_BYTES:
        return (
            f"its tiles of {case.S} keys with d_head={case.K} in {case.dtype} need "
            f"{case.vmem_bytes() >> 20} MiB of fast memory, it has "
            f"{MOST_BYTES >> 20}: shorten memory_length, or set 'blocked'"
        )
    return None
