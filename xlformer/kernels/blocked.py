"""Relative attention in plain XLA, a chunk of queries at a time.

Each chunk reads only the keys that causality and the window leave it, a slice whose
bounds are known when compiling.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xlformer.kernels import xla

CHUNK_SIZE = 128
MOST_CHUNKS = 16  # The loop is unrolled: compile time grows with it.


def attention(
    qu_BTHK,
    qw_BTHK,
    k_BSHK,
    v_BSHK,
    r_SHK,
    *,
    window,
    key_start_BT,
    causal,
    dropout_rate,
    seeds_BH2,
):
    """See kernels.relative_attention."""
    T, S = qu_BTHK.shape[1], k_BSHK.shape[1]
    mask_TS = xla.visible(T, S, window=window, causal=causal)
    size = max(CHUNK_SIZE, -(-T // MOST_CHUNKS))
    chunks = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        first, last = _keys(start, stop, T=T, S=S, window=window, causal=causal)
        r_NHK = r_SHK
        if r_SHK is not None:
            # Distances of the chunk: from its first query and last key to its last
            # query and first key. Causal tables begin at 0, others at 1 - T.
            least = max(start + (S - T) - (last - 1), 0 if causal else 1 - T)
            most = stop - 1 + (S - T) - first
            zero = 0 if causal else T - 1
            r_NHK = r_SHK[zero + least : zero + most + 1]
        with jax.named_scope("chunk"):
            chunks.append(
                xla.attend(
                    qu_BTHK[:, start:stop],
                    None if qw_BTHK is None else qw_BTHK[:, start:stop],
                    k_BSHK[:, first:last],
                    v_BSHK[:, first:last],
                    r_NHK,
                    mask_TS=mask_TS[start:stop, first:last],
                    key_start_BT=None
                    if key_start_BT is None
                    else key_start_BT[:, start:stop],
                    dropout_rate=dropout_rate,
                    seeds_BH2=seeds_BH2,
                    first_query=start,
                    first_key=first,
                )
            )
    return jnp.concatenate(chunks, axis=1)


def _keys(start, stop, *, T, S, window, causal):
    """First key that a query in [start, stop) sees, and the one after the last."""
    first, last = 0, S
    if window is not None:
        first = max(0, start + (S - T) - window)
        last = min(S, stop + (S - T) + window)
    if causal:
        last = stop + (S - T)
    return first, last
