"""Weights of other programs, to and fro."""

from xlformer.convert.transformer_xl import from_hf, from_original, to_original

__all__ = ["from_hf", "from_original", "to_original"]
