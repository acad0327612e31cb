"""Texts of Python's own library, as files: what needs no network."""

from __future__ import annotations

import numpy as np

from xlformer.data import local


def head(size: int) -> str:
    """The first bytes of what the corpus `stdlib` has for training."""
    data = b""
    for document in local.read_stdlib().splits["train"]:
        for block in document.blocks():
            data += block
            if len(data) >= size:
                break
    # A letter that was cut, or a file that is no UTF-8, loses what cannot be read.
    return data[:size].decode(errors="ignore")


def shuffled(text: str) -> str:
    """The lines of a text in an order of chance; every byte of it is still there."""
    # Not splitlines, which takes other characters for ends of lines, and loses them.
    lines = text.split("\n")
    order = np.random.default_rng(7).permutation(len(lines))
    return "\n".join(lines[i] for i in order)
