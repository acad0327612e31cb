"""What the Performer computes and keeps, by its configuration.

Useful FLOPs, as for Transformer-XL: a multiplication and an addition are 2, only matrix
products count, and no key that a query may not see. FAVOR is counted as what the sums
cost, token by token: what chunks compute beside that makes them fast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xlformer.kernels.visibility import Visibility
from xlformer.models.performer.config import (
    FAVOR,
    LINFORMER,
    LSH,
    SOFTMAX,
    PerformerConfig,
)

# As fitted for Transformer-XL's layer: see transformer_xl/footprint.py.
PER_WIDTH, PER_INNER = 13, 8


@dataclasses.dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one segment of all rows, by what they are spent on.

    Attributes:
      feed_forward: the networks.
      projections: queries, keys, values and output.
      features: FAVOR's of queries and keys; the hashes of lsh; Linformer's projections
        of the length.
      attention: what is made of them.
      vocabulary: the softmax.
    """

    feed_forward: float
    projections: float
    features: float
    attention: float
    vocabulary: float

    @property
    def forward(self) -> float:
        return sum(dataclasses.astuple(self))

    @property
    def training(self) -> float:
        """The gradient of a product is one more for each of its two arguments."""
        return 3 * self.forward


def segment(
    config: PerformerConfig,
    *,
    batch_size: int,
    segment_length: int,
    shares: Sequence[float] | None = None,
    cached: bool = False,
) -> Flops:
    """Counts one segment of all rows; see Model.flops."""
    del cached  # There is no other form of the state.
    targets, L = batch_size * segment_length, config.n_layer
    T = segment_length + config.extended_length
    N, W = batch_size * T, config.n_head * config.head_width
    features, attention = _of_token(config, T)
    return Flops(
        feed_forward=4.0 * L * N * config.d_model * config.d_inner,
        projections=8.0 * L * N * config.d_model * W,
        features=L * N * features,
        attention=L * N * attention,
        vocabulary=config.bins.flops(targets=targets, inputs=N, shares=shares),
    )


def _of_token(config: PerformerConfig, T: int) -> tuple[float, float]:
    """FLOPs a token of one layer: of features, and of attention."""
    H, K = config.n_head, config.head_width
    if config.mechanism == FAVOR:
        rows = config.projection_rows if config.projected else 0
        # A key's product with its value is added, a query reads the sum; the
        # denominators are one more column of the values.
        return 4.0 * H * K * rows, 4.0 * H * config.feature_width * (K + 1)
    if config.mechanism == SOFTMAX:
        seen_T = Visibility(None, causal=config.causal).keys_seen(T, T)
        return 0.0, 4.0 * H * K * float(seen_T.mean())
    if config.mechanism == LSH:
        # A bucket is the largest of half as many products and of their negatives.
        seen = min(2 * config.chunk, T)
        hashes = 2.0 * H * K * config.rounds * (config.buckets // 2)
        return hashes, 4.0 * H * K * config.rounds * seen
    if config.mechanism == LINFORMER:
        return (4.0 * H * K * config.projection_length,) * 2
    return 0.0, 0.0


def kept_for_backward(config: PerformerConfig) -> float:
    """Numbers a token: what all layers keep, and one layer more."""
    layer = PER_WIDTH * config.d_model + PER_INNER * config.d_inner
    kept = config.d_model if config.remat == "full" else layer
    return float(config.n_layer * kept + layer)
