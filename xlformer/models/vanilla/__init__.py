"""The vanilla character Transformer: its model, its configuration, its layers."""

from xlformer.models.vanilla.config import VanillaConfig
from xlformer.models.vanilla.model import VanillaTransformer

__all__ = ["VanillaConfig", "VanillaTransformer"]
