"""One call of relative_attention, as far as it is known when a program is traced.

The choice of an implementation depends on nothing else, nor do the shapes of the fused
kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses

import jax.numpy as jnp
import numpy as np

from xlformer.kernels.visibility import Visibility

# Policies of rematerialisation know the output of attention by this name.
OUTPUT_NAME = "attention_output"
# A field of every Call, so that a program with the tiles of a test is never taken for
# one without.
_TEST_TILES: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """Shapes and options; for equal calls the same program is compiled.

    Attributes:
      T, S: numbers of queries and of keys.
      K, V, R: widths of a key, of a value and of a distance's row; R is None where
        there are no distances.
      visibility: without the first visible keys, which are not known yet.
      starts: whether queries will have a first visible key.
      rate: the rate of dropout on the probabilities, 0 for none.
      test_tiles: queries and keys of a tile in a test; None lets the kernel choose.
    """

    T: int
    S: int
    K: int
    V: int
    R: int | None
    visibility: Visibility
    starts: bool
    rate: float
    dtype: str
    test_tiles: tuple[int, int] | None

    @classmethod
    def of(cls, qu_BTHK, k_BSHK, v_BSHK, r_SHK, visibility: Visibility, rate: float):
        """Makes a Call of the arguments of the operation, or of their shapes."""
        return cls(
            T=qu_BTHK.shape[1],
            S=k_BSHK.shape[1],
            K=k_BSHK.shape[-1],
            V=v_BSHK.shape[-1],
            R=None if r_SHK is None else r_SHK.shape[-1],
            visibility=visibility.static,
            starts=visibility.key_start_BT is not None,
            rate=rate,
            dtype=jnp.dtype(qu_BTHK.dtype).name,
            test_tiles=_TEST_TILES,
        )

    @property
    def M(self) -> int:
        return self.S - self.T

    @property
    def interpret(self) -> bool:
        """Whether kernels run as plain operations, on any device, as tests do."""
        return self.test_tiles is not None


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A call in tiles of Q queries and N keys, Q <= N. Only causal calls are cut."""

    call: Call
    Q: int
    N: int

    @property
    def query_tiles(self) -> int:
        return -(-self.call.T // self.Q)

    @property
    def key_tiles(self) -> int:
        return -(-self.call.S // self.N)

    def first_tiles(self, start_BT):
        """First tile of keys for each row and tile of queries, [B or 1, query_tiles].

        start_BT: first visible key of each query; None for all of them.
        """
        call, queries = self.call, np.arange(self.query_tiles, dtype=np.int32) * self.Q
        first, _ = call.visibility.key_range(queries, queries, call.T, call.S)
        first = jnp.asarray(first[None], jnp.int32)
        if start_BT is not None:
            # First visible keys do not decrease in T, so a tile's first query has the
            # least.
            first = jnp.maximum(first, start_BT[:, :: self.Q])
        # A tile of queries always has one of keys, whatever start_BT says.
        return jnp.minimum(first, (queries + call.M)[None]) // self.N

    def last_tile(self, i):
        """Last tile of keys that tile i of queries sees."""
        query = i * self.Q + self.Q - 1
        last = self.call.visibility.last_key(query, self.call.M) // self.N
        # The last tile of queries is padded, and its padding would look past the keys.
        return jnp.minimum(last, self.key_tiles - 1)

    def query_range(self, n):
        """[first, stop) of the tiles of queries that may see tile n of keys."""
        call, key = self.call, n * self.N
        first = call.visibility.first_query(key, call.M)
        last = call.visibility.last_query(key + self.N - 1, call.M)
        stop = self.query_tiles
        if last is not None:
            stop = jnp.minimum(last // self.Q + 1, stop)
        return jnp.maximum(first, 0) // self.Q, stop


@contextlib.contextmanager
def interpreted(*, query_tile: int, key_tile: int):
    """What is traced inside runs on any device, slowly, and with tiles of any size."""
    global _TEST_TILES
    before, _TEST_TILES = _TEST_TILES, (query_tile, key_tile)
    try:
        yield
    finally:
        _TEST_TILES = before
