"""Texts: where they come from, what their symbols are, and the stream of batches."""
