"""How many FLOPs Transformer-XL needs: arithmetic on its configuration.

A multiplication and an addition are 2; only matrix products count. They are useful
FLOPs: keys that a query may not see, what remat computes again, and padding do not
count, so that an MFU made of them does not rise with useless work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xlformer.layers.attention import LEARNED_RELATIVE, RELATIVE
from xlformer.models.transformer_xl.config import TransformerXLConfig


@dataclasses.dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one segment of all rows, by what they are spent on.

    Attributes:
      feed_forward, attention: of the layers; attention is its three products.
      projections: queries, keys, values and output of the segment's own positions.
      memory: keys and values of what was carried.
      positions: the distances' projection, once for all rows.
      vocabulary: the softmax, and the projections of narrower embeddings.
      gates: in place of the residual sums.
    """

    feed_forward: float
    projections: float
    memory: float
    positions: float
    attention: float
    vocabulary: float
    gates: float

    @property
    def forward(self) -> float:
        return sum(dataclasses.astuple(self))

    @property
    def training(self) -> float:
        """Forward and backward: three times the forward, less what needs no gradient.

        The gradient of a product is one more product for each of its two arguments. The
        memory and the sinusoids take none: their projections cost only the weights'.
        """
        leaves = self.memory + self.positions
        return 3 * (self.forward - leaves) + 2 * leaves


def segment(
    config: TransformerXLConfig,
    *,
    batch_size: int,
    segment_length: int,
    shares: Sequence[float] | None = None,
    cached: bool = False,
) -> Flops:
    """Counts one segment of all rows with a full memory; see Model.flops.

    With `cached`, keys, values and positions of the memory are not projected again.
    """
    B, M = batch_size, config.memory_length
    T = segment_length + config.extended_length
    d, W = config.d_model, config.n_head * config.head_width
    L, S = config.n_layer, M + T
    seen_T = config.visibility().keys_seen(T, S)
    relative = config.encoding in (RELATIVE, LEARNED_RELATIVE)
    projected = config.encoding == RELATIVE and not cached
    # 2 FLOPs times the number of matrices: two of the feed-forward network, four of the
    # segment's projections (queries, keys, values, output), two of the memory's, and
    # three products of relative attention (content, positions, values), or two.
    return Flops(
        feed_forward=4.0 * L * B * T * d * config.d_inner,
        projections=8.0 * L * B * T * d * W,
        memory=0.0 if cached else 4.0 * L * B * M * d * W,
        positions=2.0 * L * S * d * W if projected else 0.0,
        attention=(6.0 if relative else 4.0) * L * B * W * float(seen_T.sum()),
        vocabulary=config.bins.flops(
            targets=B * segment_length, inputs=B * T, shares=shares
        ),
        # Two in each layer, of six matrices each.
        gates=24.0 * L * B * T * d * d if config.gated else 0.0,
    )
