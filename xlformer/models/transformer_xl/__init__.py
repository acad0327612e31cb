"""Transformer-XL: its model, its configuration, its layer, its cache, its FLOPs."""

from xlformer.models.transformer_xl.config import TransformerXLConfig
from xlformer.models.transformer_xl.model import TransformerXL

__all__ = ["TransformerXL", "TransformerXLConfig"]
