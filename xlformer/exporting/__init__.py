"""Models for programs that are not ours: files of weights, and compiled functions."""
