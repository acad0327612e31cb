"""Relative attention in plain XLA, a chunk of queries at a time.

Each chunk reads only the keys that causality and the window leave it, a slice whose
bounds are known when compiling.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xlformer.kernels import xla

# With chunks of 64 nothing was won: 0.95 to 1.24 of the time of the paper's form at
# T = 128, where chunks of 128 take 0.59 to 0.77 at T = 256 and 512 (2 CPU cores,
# float32, forward and backward).
CHUNK_SIZE = 128
# The loop is unrolled, because each chunk has shapes of its own, and compile time grows
# with it; a longer segment gets larger chunks instead.
MOST_CHUNKS = 16


def attention(
    qu_BTHK,
    qw_BTHK,
    k_BSHK,
    v_BSHK,
    r_SHK,
    visibility,
    *,
    dropout_rate,
    seeds_BH2,
):
    """See kernels.relative_attention; scores are materialised a chunk at a time."""
    T, S = qu_BTHK.shape[1], k_BSHK.shape[1]
    size = max(CHUNK_SIZE, -(-T // MOST_CHUNKS))
    chunks = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        first, last = visibility.key_range(start, stop - 1, T, S)
        r_NHK = r_SHK
        if r_SHK is not None:
            # Distances of the chunk: from its first query and last key to its last
            # query and first key. Causal attention has no rows below distance 0.
            zero = r_SHK.shape[0] - S
            least = max(start + (S - T) - (last - 1), -zero)
            most = stop - 1 + (S - T) - first
            r_NHK = r_SHK[zero + least : zero + most + 1]
        with jax.named_scope("chunk"):
            chunks.append(
                xla.attention(
                    qu_BTHK[:, start:stop],
                    None if qw_BTHK is None else qw_BTHK[:, start:stop],
                    k_BSHK[:, first:last],
                    v_BSHK[:, first:last],
                    r_NHK,
                    visibility.of_queries(start, stop),
                    memory_length=S - T,
                    dropout_rate=dropout_rate,
                    seeds_BH2=seeds_BH2,
                    first_query=start,
                    first_key=first,
                )
            )
    return jnp.concatenate(chunks, axis=1)
