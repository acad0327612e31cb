"""Where people import `Checkpoints` from since 0.1.0; it lives in runs.checkpoints."""

from xlformer.runs.checkpoints import Checkpoints

__all__ = ["Checkpoints"]
