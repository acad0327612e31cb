"""Performer: its model, its configuration, its layer, and what it was compared with."""

from xlformer.models.performer.config import PerformerConfig
from xlformer.models.performer.model import Performer

__all__ = ["Performer", "PerformerConfig"]
