"""Language models that remember beyond their context window, in JAX."""

__version__ = "0.2.0"
