"""How the fused TPU kernels of pallas_tpu.py cut a call, and what they refuse.

Everything here is known when a program is traced.
"""

from __future__ import annotations

import math

from xlformer.kernels.call import Call, Tiles

# Tiles are large because a step of the grid costs about 0.35 us whatever is in it
# (Pallas guide). In that time a v5e could do 69 MFLOP; a tile like this has 50 at head
# size 64.
MOST_QUERIES, MOST_KEYS = 256, 512
# Of the fast memory (VMEM) of the chips from v5e on, 64 MiB at least. v4 has 16, and no
# strided rotation either: there the kernels do not compile.
MOST_BYTES = 48 << 20


class TPUTiles(Tiles):
    """Q and N are multiples of 128 outside of tests; Tp, Sp: T and S in whole tiles."""

    @property
    def Tp(self) -> int:
        return self.query_tiles * self.Q

    @property
    def Sp(self) -> int:
        return self.key_tiles * self.N

    @property
    def step(self) -> int:
        """A divisor of the first row of r that a tile needs, for aligned loads."""
        return math.gcd(self.Q, self.N)

    def vmem_bytes(self) -> int:
        """An upper estimate for the backward kernel, which is the larger one."""
        call = self.call
        size = 2 if call.dtype == "bfloat16" else 4
        K, V, R = (-(-(width or 0) // 128) * 128 for width in (call.K, call.V, call.R))
        # Widths fill lanes of 128. In come qu, qw, o and do, out go dqu and dqw.
        queries = self.Q * (2 * K + 2 * V + 2 * R)
        keys = self.N * (K + V)
        whole = self.Sp * (K + V)
        distances = (self.Tp + self.Sp) * R
        # Twice: Pallas copies one block while it works on another. dr is in float32.
        streams = 2 * size * (queries + keys + whole + distances) + 2 * 4 * distances
        scratch = 4 * (whole + self.Q * (K + R + 3 * 128))
        # Tiles of scores in float32 that are alive at once, 8 of them with their
        # shifted forms: an upper bound.
        work = 4 * self.Q * (self.Q + self.N) * 8
        return streams + scratch + work


def cut(call: Call) -> TPUTiles:
    """Cuts a call into the tiles that pad it least."""
    if call.interpret:
        return TPUTiles(call, *call.test_tiles)
    Q = _tile(call.T, 128, MOST_QUERIES)
    return TPUTiles(call, Q, _tile(call.S, Q, MOST_KEYS))


def _tile(n, least, most):
    """The multiple of 128 that pads n least; the largest of equals."""
    # From the largest down, because min keeps the first of equals.
    sizes = range(most, least - 1, -128)
    return min(sizes, key=lambda size: -(-n // size) * size)


def refusal(call: Call, platform: str) -> str | None:
    """Why this kernel cannot run this, in one line; None if it can."""
    if platform != "tpu" and not call.interpret:
        return f"needs a TPU, this is {platform}: set 'auto' or 'blocked'"
    if not call.visibility.causal:
        return "knows only causal attention: set 'auto' or 'blocked'"
    if call.dtype not in ("float32", "bfloat16"):
        return f"knows float32 and bfloat16, not dtype={call.dtype}"
    needed = cut(call).vmem_bytes()
    if needed > MOST_BYTES:
        return (
            f"its tiles of {call.S} keys with d_head={call.K} in {call.dtype} need "
            f"{needed >> 20} MiB of fast memory, it has "
            f"{MOST_BYTES >> 20}: shorten memory_length, or set 'blocked'"
        )
    return None
