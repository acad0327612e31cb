"""What a query may see: the one place that knows it.

Query t of T and key s of S lie on one line, [memory; segment]: with M = S - T slots of
memory the query stands at key M + t, and its distance to key s is M + t - s. Masks,
bounds of chunks and tiles, and counts of visible keys are all asked from here.

Another rule is one more static field and a condition in `allows`. If it lets fewer keys
through at either end, first_key and its three companions may say so too: then chunks
and tiles are skipped; if it lets more through, they must. Only `sees` relies on exact
bounds, and on the visible keys of a query having no gaps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which keys the queries of one call see: a pytree with key_start_BT as its leaf.

    Attributes:
      window: largest visible distance, self being 0; None is everything. It is stated
        and not derived from the memory, because the originals differ: with same_length
        the one in TensorFlow shows M + 1 keys, the one in PyTorch M.
      key_start_BT: index in S of the first visible key of each query, non-decreasing in
        T and never past the query itself. It carries partly filled memory, resets and
        padding on the left; None hides nothing.
      causal: no key after the query is visible. Without it the window reaches ahead as
        far as back.
    """

    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    key_start_BT: Any = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def static(self) -> Visibility:
        """What is known when a program is traced, which can be hashed and compared."""
        return dataclasses.replace(self, key_start_BT=None)

    def of_queries(self, start: int, stop: int) -> Visibility:
        """The visibility of the queries [start, stop), which keep their indices."""
        if self.key_start_BT is None:
            return self
        return dataclasses.replace(self, key_start_BT=self.key_start_BT[:, start:stop])

    def allows(self, query, key, M: int, start=None):
        """Whether each query sees each key.

        Made of operators alone, so that it works on numbers, on the arrays of numpy and
        JAX, and on a tile inside of a kernel.

        Args:
          query, key: indices in T and in S, which broadcast against each other.
          M: slots of memory, S - T.
          start: first visible key of each query, if they have one.
        """
        distance = query + M - key
        if not self.causal:
            distance = abs(distance)
        # True throughout where it is not causal, but in the shape that both broadcast
        # to.
        visible = distance >= 0
        if self.window is not None:
            # `&` and not `and`: a tile inside of a kernel has no truth value.
            visible = visible & (distance <= self.window)
        return visible if start is None else visible & (key >= start)

    def mask(self, queries: np.ndarray, keys: np.ndarray, M: int):
        """`allows` for all heads, [B or 1, 1, queries, keys].

        A constant of the program, unless there is a key_start_BT. Its columns are those
        of `queries`: see of_queries.
        """
        start_BT = self.key_start_BT
        start_B1T1 = None if start_BT is None else start_BT[:, None, :, None]
        queries, keys = queries[None, None, :, None], keys[None, None, None]
        return self.allows(queries, keys, M, start_B1T1)

    # Bounds of what `allows` lets through, key_start_BT aside. They are for skipping
    # work, so they may be too wide. They may lie outside of [0, S) and [0, T), and are
    # None where there is no bound. None of them moves back when its argument grows: the
    # bounds of a group are those of its first and of its last member.

    def first_key(self, query, M: int):
        """The first key that the query sees."""
        return None if self.window is None else query + M - self.window

    def last_key(self, query, M: int):
        """The last key that the query sees."""
        if self.causal:
            return query + M
        return None if self.window is None else query + M + self.window

    def first_query(self, key, M: int):
        """The first query that sees the key."""
        if self.causal:
            return key - M
        return None if self.window is None else key - M - self.window

    def last_query(self, key, M: int):
        """The last query that sees the key."""
        return None if self.window is None else key - M + self.window

    def key_range(self, first_query, last_query, T: int, S: int):
        """[first, stop) of the keys that queries first_query to last_query may see.

        Numbers or arrays of numpy, known when a program is traced.
        """
        first = self.first_key(first_query, S - T)
        last = self.last_key(last_query, S - T)
        return (
            np.zeros_like(first_query) if first is None else np.maximum(first, 0),
            np.full_like(last_query, S) if last is None else np.minimum(last + 1, S),
        )

    def keys_seen(self, T: int, S: int) -> np.ndarray:
        """How many keys each query sees with a full memory, [T].

        >>> Visibility(window=2).keys_seen(3, 4)
        array([2, 3, 3])
        """
        mask_11TS = self.static.mask(np.arange(T), np.arange(S), S - T)
        return mask_11TS[0, 0].sum(1)

    def sees(self, marked_BS: jax.Array, T: int) -> jax.Array:
        """Which of the last T positions see a key that is marked, [B, T].

        It is enough to look at the newest mark up to the last visible key, because the
        visible ones have no gaps: S numbers a row to go through, not T S.
        """
        S = marked_BS.shape[1]
        queries = np.arange(T)
        first, stop = self.key_range(queries, queries, T, S)
        index_BS = jnp.broadcast_to(jnp.arange(S)[None], marked_BS.shape)
        newest_BS = lax.cummax(jnp.where(marked_BS, index_BS, -1), axis=1)
        # A slice where it is one: a gather costs the TPU more than all of the rest.
        newest_BT = newest_BS[:, S - T :] if self.causal else newest_BS[:, stop - 1]
        start_BT = 0 if self.key_start_BT is None else self.key_start_BT
        return newest_BT >= jnp.maximum(first[None], start_BT)
