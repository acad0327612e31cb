"""How many FLOPs Transformer-XL needs: arithmetic on its configuration.

A multiplication and an addition are 2; only matrix products count. Useful FLOPs: keys
that a query may not see, what remat computes again, and padding do not count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from xlformer.layers.adaptive import Bins
from xlformer.layers.attention import LEARNED_RELATIVE, RELATIVE

# Zipf's law for the words of a text, p(rank) ~ rank^-1.07: with the four bins of
# WikiText-103 shares of .87, .04, .08, .01. It decides what an adaptive softmax costs.
ZIPF = 1.07


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of one segment of all rows, forward.

    Attributes:
      feed_forward, attention: of the layers; attention is its three products.
      projections: queries, keys, values and output of the segment's own positions.
      memory: keys and values of what was carried.
      positions: the distances' projection, once for all rows.
      vocabulary: the softmax, and the projections of narrower embeddings.
    """

    feed_forward: float
    projections: float
    memory: float
    positions: float
    attention: float
    vocabulary: float

    @property
    def forward(self) -> float:
        return sum(dataclasses.astuple(self))

    @property
    def training(self) -> float:
        """Backward is twice the forward; memory and distances take no gradient."""
        leaves = self.memory + self.positions
        return 3 * (self.forward - leaves) + 2 * leaves


def segment(
    config,
    *,
    batch_size: int,
    segment_length: int,
    shares: Sequence[float] | None = None,
    cached: bool = False,
) -> Flops:
    """Counts one segment of all rows with a full memory.

    Args:
      config: a TransformerXLConfig with its vocab_size.
      shares: of the targets in each bin of an adaptive softmax; by default Zipf's law.
      cached: keys, values and positions come from a cache, as in evaluation.
    """
    B, M = batch_size, config.memory_length
    T = segment_length + config.extended_length
    d, W = config.d_model, config.n_head * config.head_width
    L, S = config.n_layer, M + T
    seen_T = M + 1 + np.arange(T)
    if config.attention_window is not None:
        seen_T = np.minimum(seen_T, config.attention_window + 1)
    relative = config.encoding in (RELATIVE, LEARNED_RELATIVE)
    projected = config.encoding == RELATIVE and not cached
    return Flops(
        feed_forward=4.0 * L * B * T * d * config.d_inner,
        projections=8.0 * L * B * T * d * W,
        memory=0.0 if cached else 4.0 * L * B * M * d * W,
        positions=2.0 * L * S * d * W if projected else 0.0,
        attention=(6.0 if relative else 4.0) * L * B * W * float(seen_T.sum()),
        vocabulary=_vocabulary(config, shares, B * segment_length, B * T),
    )


def _vocabulary(config, shares, targets: int, inputs: int) -> float:
    bins = Bins(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_embed=config.embedding_width,
        cutoffs=config.cutoffs,
        div_val=config.div_val,
        proj_same_dim=config.proj_same_dim,
    )
    if shares is None:
        shares = bin_shares(frequencies(config.vocab_size), config.cutoffs)
    total = 0.0
    for b, share in enumerate(shares):
        width = bins.width(b)
        words = bins.edges[b + 1] - bins.edges[b] + (bins.n_tail if b == 0 else 0)
        scored = targets * (1.0 if b == 0 else share)
        total += 2.0 * scored * width * words
        if bins.projects(b):
            total += 2.0 * (scored + inputs * share) * width * config.d_model
    return total


def frequencies(vocab_size: int) -> np.ndarray:
    """Probability of each id, most frequent first, by Zipf's law."""
    weights = np.arange(1, vocab_size + 1, dtype=np.float64) ** -ZIPF
    return weights / weights.sum()


def bin_shares(probabilities: np.ndarray, cutoffs: Sequence[int]) -> list[float]:
    """How much of the text lies in each bin of an adaptive softmax."""
    edges = (0, *cutoffs, len(probabilities))
    pairs = zip(edges, edges[1:], strict=False)
    return [float(probabilities[start:stop].sum()) for start, stop in pairs]
