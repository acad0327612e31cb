"""What the choice of an implementation of attention depends on.

Everything here is known when a program is traced.
"""

from __future__ import annotations

import contextlib
import dataclasses

import jax.numpy as jnp

OUTPUT_NAME = "attention_output"  # for policies of rematerialisation
_TEST_TILES: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options of one call of relative_attention.

    Attributes:
      K, V, R: widths of a key, of a value and of a distance's row (None without).
      rate: of dropout.
      starts: whether each query says which key it sees first.
      tiles: queries and keys of a tile, where a test says so; else the kernel does.
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
    tiles: tuple[int, int] | None

    @classmethod
    def of(cls, qu_BTHK, k_BSHK, v_BSHK, r_SHK, *, key_start_BT, **options):
        """From the arguments of the operation, or their shapes."""
        return cls(
            T=qu_BTHK.shape[1],
            S=k_BSHK.shape[1],
            K=k_BSHK.shape[-1],
            V=v_BSHK.shape[-1],
            R=None if r_SHK is None else r_SHK.shape[-1],
            dtype=jnp.dtype(qu_BTHK.dtype).name,
            starts=key_start_BT is not None,
            tiles=_TEST_TILES,
            **options,
        )

    @property
    def M(self) -> int:
        return self.S - self.T

    @property
    def interpret(self) -> bool:
        """As plain operations, on any device (tests)."""
        return self.tiles is not None


@contextlib.contextmanager
def interpreted(*, query_tile: int, key_tile: int):
    """What is traced inside runs on any device, slowly, and with tiles of any size."""
    global _TEST_TILES
    before, _TEST_TILES = _TEST_TILES, (query_tile, key_tile)
    try:
        yield
    finally:
        _TEST_TILES = before
