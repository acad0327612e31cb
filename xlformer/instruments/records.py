"""What an earlier call has found, in files that say what was asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xlformer import strangers


def read(file, **asked) -> dict[str, Any] | None:
    """The record of a file; None where there is none of what is asked.

    asked: one name, under which the record has this value. A damaged file has none.
    """
    try:
        found = strangers.read_json(file)
    except (OSError, ValueError):
        return None
    same = isinstance(found, Mapping) and asked.items() <= found.items()
    return found if same else None
