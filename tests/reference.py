"""Naive references: double loops over queries and keys, word by word, slot by slot."""

import numpy as np


def attention(*arrays, **options):
    """kernels.relative_attention from its docstring: one query, one key at a time."""
    qu_BTHK, _, _, v_BSHK, _ = arrays
    y_BTHK = np.zeros(qu_BTHK.shape[:3] + v_BSHK.shape[3:])
    for (b, t, h), keys, _, p in _queries(*arrays, **options):
        y_BTHK[b, t, h] = sum(p[s] * v_BSHK[b, s, h] for s in keys)
    return y_BTHK


def attention_gradients(dy_BTHK, *arrays, **options):
    """Gradients of (attention * dy).sum() by each array, None for None."""
    qu_BTHK, qw_BTHK, k_BSHK, v_BSHK, r_SHK = arrays
    grads = [None if x is None else np.zeros(x.shape) for x in arrays]
    dqu_BTHK, dqw_BTHK, dk_BSHK, dv_BSHK, dr_SHK = grads
    for (b, t, h), keys, rows, p in _queries(*arrays, **options):
        dp = {s: dy_BTHK[b, t, h] @ v_BSHK[b, s, h] for s in keys}
        mean = sum(p[s] * dp[s] for s in keys)
        for s in keys:
            dscore = p[s] * (dp[s] - mean)
            dv_BSHK[b, s, h] += p[s] * dy_BTHK[b, t, h]
            dqu_BTHK[b, t, h] += dscore * k_BSHK[b, s, h]
            dk_BSHK[b, s, h] += dscore * qu_BTHK[b, t, h]
            if r_SHK is not None:
                dqw_BTHK[b, t, h] += dscore * r_SHK[rows[s], h]
                dr_SHK[rows[s], h] += dscore * qw_BTHK[b, t, h]
    return grads


# What a query may see: all implementations and every answer of Visibility are held
# against these rules, and against `visible`, which knows them all.
RULES = {
    "causal": {},
    "window": dict(window=3),
    "window_of_self": dict(window=0),
    "bidirectional": dict(causal=False),
    "bidirectional_window": dict(causal=False, window=2),
}


def visible(t, s, M, *, start=None, window=None, causal=True):
    """Whether query t of the segment sees key s of [memory; segment]."""
    if causal and s > M + t:
        return False
    if start is not None and s < start:
        return False
    return window is None or abs(M + t - s) <= window


def _queries(qu_BTHK, qw_BTHK, k_BSHK, v_BSHK, r_SHK, *, key_start_BT=None, **rule):
    """(b, t, h), the visible keys, and by key the row of r and the probability."""
    B, T, H, _ = qu_BTHK.shape
    S = k_BSHK.shape[1]
    for b, t, h in np.ndindex(B, T, H):
        rows, scores = {}, {}
        start = None if key_start_BT is None else key_start_BT[b, t]
        for s in range(S):
            if not visible(t, s, S - T, start=start, **rule):
                continue
            d = t + (S - T) - s
            rows[s] = d if rule.get("causal", True) else d + T - 1
            scores[s] = qu_BTHK[b, t, h] @ k_BSHK[b, s, h]
            if r_SHK is not None:
                scores[s] += qw_BTHK[b, t, h] @ r_SHK[rows[s], h]
        total = sum(np.exp(score) for score in scores.values())
        yield (b, t, h), list(rows), rows, {s: np.exp(scores[s]) / total for s in rows}


def relative_shift(raw_TW, S):
    """Entry (t, s) is the column of distance t + M - s; columns descend from S-1.

    A distance that has no column is nan.
    """
    T, W = raw_TW.shape
    shifted_TS = np.full((T, S), np.nan)
    for t, s in np.ndindex(T, S):
        column = S - 1 - (t + (S - T) - s)
        if column < W:
            shifted_TS[t, s] = raw_TW[t, column]
    return shifted_TS


def log_softmax(logits):
    """In float64."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def adaptive_log_probs(h_ND, kernels_DV, biases_V, cutoffs):
    """log p of every word, one bin at a time.

    Args:
      h_ND: hidden vectors.
      kernels_DV: of the head (bin 0's words, then one column for each tail bin) and of
        each tail bin, with the projections multiplied in.
      biases_V: alike.
      cutoffs: the first id of each tail bin.
    """
    head_NV = log_softmax(h_ND @ kernels_DV[0] + biases_V[0])
    parts = [head_NV[:, : cutoffs[0]]]
    for b in range(1, len(kernels_DV)):
        tail_NV = log_softmax(h_ND @ kernels_DV[b] + biases_V[b])
        parts.append(head_NV[:, cutoffs[0] + b - 1, None] + tail_NV)
    return np.concatenate(parts, axis=1)


def memory(slots, x, resets, M):
    """One row's valid slots after the tokens x: a list, oldest first."""
    slots = list(slots)
    for vector, reset in zip(x, resets, strict=True):
        slots = [] if reset else slots
        slots = (slots + [vector])[-M:] if M else []
    return slots


def key_start(length, resets, M):
    """First visible key of each query of one row."""
    starts, start = [], M - length
    for t, reset in enumerate(resets):
        start = M + t if reset else start
        starts.append(start)
    return starts
