"""The processes of one run: how they meet, agree and end, and who watches them."""

from xlformer.hosts.job import (
    Stop,
    add_flags,
    agree,
    is_first,
    join,
    leaving_at_once,
    same,
    say,
)
from xlformer.hosts.readers import reading

__all__ = [
    "Stop",
    "add_flags",
    "agree",
    "is_first",
    "join",
    "leaving_at_once",
    "reading",
    "same",
    "say",
]
