"""Converts the weights of other programs to ours, and back."""

from xlformer.convert.transformer_xl import from_hf, from_original, to_original

__all__ = ["from_hf", "from_original", "to_original"]
