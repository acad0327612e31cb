"""What an earlier call has found, in files that say what was asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def read(file, **asked) -> dict[str, Any] | None:
    """The record of a file; None where there is none of what is asked.

    asked: one name, under which the record has this value. A damaged file has none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    # Nested deeply enough it is a RecursionError.
    except (OSError, ValueError, RecursionError):
        return None
    same = isinstance(found, Mapping) and asked.items() <= found.items()
    return found if same else None
