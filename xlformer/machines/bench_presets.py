"""What others published of speed, to be run here: --preset=NAME of xlformer.bench.

Every line is a config of configs/ with their shapes and the vocabulary of their data;
the tokens are random.
"""

from __future__ import annotations

from typing import NamedTuple

from xlformer.errors import Argument, UserError, did_you_mean


class Published(NamedTuple):
    """A published figure, which compares with ours on the same device only.

    Attributes:
      ms: mean latency of a batch, where it was published.
    """

    tokens_per_second: float
    device: str
    ms: float | None = None


class Line(NamedTuple):
    """One row of a table."""

    label: str
    config: str
    mode: str = "train"
    overrides: tuple[str, ...] = ()
    published: Published | None = None


# The README of NVIDIA DeepLearningExamples, Transformer-XL for PyTorch, states these
# under "Training performance results" and "Inference performance results", for one A100
# of 40 GB.
_TRAIN = "A100 40GB, PyTorch, mixed precision"
_INFER = "A100 40GB, TorchScript, FP16"
# Only its program for TensorFlow was published with 64 rows.
_TENSORFLOW = "A100 40GB, TensorFlow 1 with XLA, mixed precision"


def _scored(size: str, rows: int, tokens_per_second: float, ms: float) -> Line:
    """A line of scoring, with the lengths of the config's own section eval."""
    return Line(
        f"{size}, {rows} rows",
        f"wt103_{size}_nvidia",
        "eval",
        (f"eval.batch_size={rows}",),
        Published(tokens_per_second, _INFER, ms),
    )


PRESETS = {
    "nvidia_train": (
        Line(
            "base, 32 rows",
            "wt103_base_nvidia:batch=32",
            published=Published(59_961, _TRAIN),
        ),
        Line(
            "base, 64 rows",
            "wt103_base_nvidia:batch=64",
            published=Published(36_455, _TENSORFLOW),
        ),
        Line(
            "large, 8 rows",
            "wt103_large_nvidia:batch=8",
            published=Published(21_554, _TRAIN),
        ),
        Line(
            "large, 16 rows",
            "wt103_large_nvidia:batch=16",
            published=Published(25_084, _TRAIN),
        ),
    ),
    "nvidia_inference": (
        _scored("base", 1, 6_935.9, 9.23),
        _scored("base", 16, 90_767.8, 11.27),
        _scored("base", 32, 107_082.4, 19.11),
        _scored("large", 1, 11_068.2, 11.57),
        _scored("large", 16, 30_783.0, 66.48),
        _scored("large", 32, 32_161.6, 127.26),
    ),
    # The paper's models in the shapes that they were trained in; it states no speed.
    "enwik8": (
        Line("12 layers, 22 rows", "enwik8_base:batch=22"),
        Line("24 layers, 16 rows", "enwik8_large:batch=16"),
    ),
}


def lines(name: str) -> tuple[Line, ...]:
    """The lines of a preset; UserError for an unknown one."""
    if name not in PRESETS:
        near = did_you_mean(name, PRESETS)
        raise UserError(Argument("preset", name), f": no such preset{near}")
    return PRESETS[name]
