"""A work directory: reading it, writing it, and what keeps it whole."""

from xlformer.runs.reading import (
    CHECKPOINT_HELP,
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    EVALUATIONS,
    VOCABULARY,
    Run,
    is_checkpoint,
    load,
    names_data,
    read_config,
    read_sealed,
    read_vocabulary,
    refuse_links,
)

__all__ = [
    "CHECKPOINT_HELP",
    "CHECKPOINTS",
    "CONFIG",
    "EVALUATION",
    "EVALUATIONS",
    "Run",
    "VOCABULARY",
    "is_checkpoint",
    "load",
    "names_data",
    "read_config",
    "read_sealed",
    "read_vocabulary",
    "refuse_links",
]
