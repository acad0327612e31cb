"""The measurements behind the papers' claims, for any models (see docs/instruments.md).

Each is a module that `instrument.Instrument` describes, and NAMES says which.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from xlformer.errors import UserError, did_you_mean

# Not while it runs: processes of apart.py would start with a second of imports.
if TYPE_CHECKING:
    from xlformer.instruments.instrument import Instrument

# By name, what each one measures.
NAMES = {
    "recl": "how much context a model makes use of, beside others",
    "cost": "time per token of memory, of recomputing, and of a window with a cache",
    "ablation": "Transformer-XL without each of its parts",
    "length": "time and memory of kinds of attention against the length",
    "features": "the error of FAVOR+ against its features, angles and lengths",
    "transfer": "softmax weights read by approximations of softmax",
    "tasks": "copying, reversing, adding, agreeing, at lengths never seen",
    "systems": "all systems under one budget",
    "samples": "articles that go on, and how they repeat themselves",
}


def find(name: str) -> Instrument:
    """The instrument of a name."""
    if name not in NAMES:
        raise UserError(f"no instrument {name!r}{did_you_mean(name, NAMES)}")
    return importlib.import_module(f"xlformer.instruments.{name}")
