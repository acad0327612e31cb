"""Models that differ in their attention alone, and an LSTM of their size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xlformer import models

VOCABULARY = 256  # the paper's
LINFORMER, LSTM, FLOOR = "linformer", "lstm", "identity"
# Fields of config.model that are not the same for all mechanisms.
PERFORMERS = {
    "softmax": {},
    "favor": {"carry_sums": False},  # as the paper's: a segment sees itself alone
    "lsh": {},
    LINFORMER: {"causal": False},
    "identity": {},
}
KINDS = (*PERFORMERS, LSTM)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models, and of what is measured.

    Attributes:
      together: whether all rows of a model share one process.
      least_seconds: for which passes are timed.
    """

    n_layer: int
    d_model: int
    n_head: int
    kinds: tuple[str, ...]
    lengths: tuple[int, ...]
    together: bool
    least_seconds: float


SIZES = {
    "small": Sizes(2, 64, 2, KINDS, (1024, 2048, 4096, 8192, 16384), False, 1.0),
    "tiny": Sizes(1, 16, 2, ("softmax", "favor"), (64, 128), True, 0.0),
}


def kind_models(kind: str, sizes: Sizes, lengths: Sequence[int]) -> dict:
    """The model of a kind for each length, with about as many parameters as others."""
    shape = {
        "vocab_size": VOCABULARY,
        "n_layer": sizes.n_layer,
        "d_model": sizes.d_model,
        "dropout": 0.0,
        "dtype": "float32",
    }
    if kind == LSTM:
        # Two layers, of 3/2 d units and of d, have 25 d^2; two of a Transformer 24 d^2.
        fields = {"name": "lstm", **shape, "d_hidden": sizes.d_model * 3 // 2}
        return dict.fromkeys(lengths, models.build(fields))
    fields = {
        "name": "performer",
        **shape,
        "n_head": sizes.n_head,
        "d_inner": 4 * sizes.d_model,
        "mechanism": kind,
        **PERFORMERS[kind],
    }
    if kind != LINFORMER:
        return dict.fromkeys(lengths, models.build(fields))
    # Its projection has a row for each position.
    return {n: models.build({**fields, "context_length": n}) for n in lengths}
