"""A work directory: reading it, writing it, and what keeps it whole."""

from xlformer.runs.reading import (
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    EVALUATIONS,
    VOCABULARY,
    Run,
    is_step,
    load,
    names_data,
    read_config,
    read_sealed,
    read_vocabulary,
    refuse_links,
)

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "EVALUATION",
    "EVALUATIONS",
    "Run",
    "VOCABULARY",
    "is_step",
    "load",
    "names_data",
    "read_config",
    "read_sealed",
    "read_vocabulary",
    "refuse_links",
]
