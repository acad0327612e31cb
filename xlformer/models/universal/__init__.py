"""Universal Transformer: its model, its configuration, its layer, its steps."""

from xlformer.models.universal.config import UniversalConfig
from xlformer.models.universal.model import UniversalTransformer

__all__ = ["UniversalConfig", "UniversalTransformer"]
