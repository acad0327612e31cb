"""The members of the ablation, with what the paper has of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from xlformer.layers.attention import (
    LEARNED_ABSOLUTE,
    LEARNED_RELATIVE,
    RELATIVE,
    SINUSOID,
)

TYPES = {
    "relative": RELATIVE,
    "Shaw": LEARNED_RELATIVE,
    "Vaswani": SINUSOID,
    "Al-Rfou": LEARNED_ABSOLUTE,
}


class Kind(NamedTuple):
    """A Transformer-XL with or without each of its parts.

    Attributes:
      positions: of TYPES.
      memory: whether it has one, of the length of a segment.
      half: whether only the later half of each segment is learned from.
      paper: perplexity on WikiText-103 as trained, the best, and the shortest attention
        length that gives it (Dai et al. 2019, table 6); None is not in it.
    """

    positions: str
    memory: bool
    half: bool
    paper: tuple[float | None, float | None, int | None] = (None, None, None)

    @property
    def folder(self) -> str:
        memory, loss = "memory" if self.memory else "none", self.loss
        return f"{self.positions.lower().replace('-', '_')}-{memory}-{loss}"

    @property
    def loss(self) -> str:
        return "half" if self.half else "full"

    def model(self, segment: int) -> dict[str, Any]:
        """Fields of config.model for segments of so many tokens."""
        kind = TYPES[self.positions]
        memory = segment if self.memory else 0
        learned = kind in (LEARNED_RELATIVE, LEARNED_ABSOLUTE)
        absolute = kind in (SINUSOID, LEARNED_ABSOLUTE)
        return {
            "attn_type": kind,
            "memory_length": memory,
            "table_length": segment + memory if learned else 0,
            # What the paper says must fail: a position of the memory and one of the
            # segment are the same.
            "allow_incoherent_positions": absolute and self.memory,
        }


KINDS = (
    Kind("relative", memory=True, half=False, paper=(27.02, 26.77, 500)),
    Kind("Shaw", memory=True, half=False, paper=(27.94, 27.94, 256)),
    Kind("Vaswani", memory=True, half=False),
    Kind("relative", memory=True, half=True, paper=(28.69, 28.33, 460)),
    Kind("relative", memory=False, half=False, paper=(29.59, 29.02, 260)),
    Kind("relative", memory=False, half=True, paper=(30.10, 30.10, 120)),
    Kind("Shaw", memory=False, half=False, paper=(29.75, 29.75, 120)),
    Kind("Shaw", memory=False, half=True, paper=(30.50, 30.50, 120)),
    Kind("Vaswani", memory=False, half=False),
    Kind("Vaswani", memory=False, half=True, paper=(30.97, 30.97, 120)),
    Kind("Al-Rfou", memory=False, half=True, paper=(31.16, 31.16, 120)),
)
# Table 7: perplexity on lm1b, whose sentences stand in random order.
SHUFFLED = (KINDS[0], KINDS[1], KINDS[4])
SHUFFLED_PAPER = dict(zip(SHUFFLED, (25.2, 25.7, 27.1), strict=True))
