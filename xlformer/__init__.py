"""Language models that remember beyond their context window, in JAX."""

__version__ = "0.1.0"
