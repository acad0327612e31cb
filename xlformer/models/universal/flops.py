"""What the Universal Transformer computes, keeps and exchanges, by its configuration.

Useful FLOPs, as for Transformer-XL: a multiplication and an addition are 2, and only
matrix products count. ACT is counted at its most steps, which are all computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xlformer.layers.separable import WIDTHS
from xlformer.models.universal.config import UniversalConfig

# As fitted for Transformer-XL's layer: see transformer_xl/footprint.py.
PER_WIDTH, PER_INNER = 13, 8


@dataclasses.dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one segment of all rows, by what they are spent on.

    Attributes:
      transition: feed-forward networks, or separable convolutions.
      projections: queries, keys, values and output of the segment's own positions.
      memory: keys and values of what was carried.
      positions: the distances' projection, in each step, once for all rows.
      attention: its two products, or three.
      halting: probabilities.
      vocabulary: the softmax.
    """

    transition: float
    projections: float
    memory: float
    positions: float
    attention: float
    halting: float
    vocabulary: float

    @property
    def forward(self) -> float:
        return sum(dataclasses.astuple(self))

    @property
    def training(self) -> float:
        """Three times the forward, less what needs no gradient of its input."""
        leaves = self.memory + self.positions
        return 3 * (self.forward - leaves) + 2 * leaves


def segment(
    config: UniversalConfig,
    *,
    batch_size: int,
    segment_length: int,
    shares: Sequence[float] | None = None,
    cached: bool = False,
) -> Flops:
    """Counts one segment of all rows with a full memory; see Model.flops."""
    del cached  # There is no other form of the state.
    B, M, L = batch_size, config.memory_length, config.depth
    T = segment_length + config.extended_length
    d, W, N = config.d_model, config.n_head * config.head_width, batch_size * T
    seen_T = config.visibility().keys_seen(T, M + T)
    relative = config.positions == "relative"
    rows = M + T if config.causal else M + 2 * T - 1
    transition = 4.0 * L * N * d * config.d_inner
    if config.transition == "sepconv":
        transition += 2.0 * L * N * (WIDTHS[0] * d + WIDTHS[1] * config.d_inner)
    return Flops(
        transition=transition,
        projections=8.0 * L * N * d * W,
        memory=4.0 * L * B * M * d * W,
        positions=2.0 * L * rows * d * W if relative else 0.0,
        attention=(6.0 if relative else 4.0) * L * B * W * float(seen_T.sum()),
        halting=0.0 if config.act == "none" else 2.0 * config.steps * N * d,
        vocabulary=config.bins.flops(
            targets=B * segment_length, inputs=N, shares=shares
        ),
    )


def kept_for_backward(config: UniversalConfig) -> float:
    """Numbers a token: what all layers of all steps keep, and one layer more."""
    layer = PER_WIDTH * config.d_model + PER_INNER * config.d_inner
    kept = config.d_model if config.remat == "full" else layer
    # With ACT each step keeps the states that its weights are of, before and after.
    halting = 0 if config.act == "none" else 3 * config.d_model
    return config.depth * kept + config.steps * halting + layer


def summed_activations(config: UniversalConfig) -> float:
    """Four sums of the width in each layer of each step (Shoeybi et al. 2019)."""
    return 4.0 * config.depth * config.d_model
