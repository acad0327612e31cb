"""What plain_pickle makes of a pickle: objects without the code of their classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

MOST_TEXT = 1 << 26  # characters of many strings; lm1b's words have 7 million


class Skipped:
    """Something that was not kept."""

    __slots__ = ()


class Name(NamedTuple):
    """A class or a function that the file names, and what it stands for."""

    name: str
    role: str


class Call(NamedTuple):
    """A call that the file asks for, which was not made."""

    name: str
    given: tuple


class Pairs:
    """The items of a dict in their order, of which keys may repeat and be anything."""

    __slots__ = ("items",)

    def __init__(self, items: list):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for item in self.items:
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise ValueError("an item of a dict that is no pair")
            yield item[0], item[1]

    def fields(self) -> dict[str, Any]:
        """What keys that are strings stand for; of one that repeats, the last."""
        items = list(self)
        return dict(zip(texts(k for k, _ in items), (x for _, x in items), strict=True))


class Instance:
    """An object: the name of its class and the state that it was given."""

    __slots__ = ("name", "state")

    def __init__(self, name: str):
        self.name, self.state = name, None

    def attributes(self) -> dict[str, Any]:
        """Its attributes; of a name that repeats, the last."""
        if not isinstance(self.state, Pairs):
            raise ValueError(f"a {self.name} that has no attributes")
        return self.state.fields()


def text(value) -> str:
    """A string of either Python: Python 2 wrote bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__} in place of a string")
    return value


def texts(values: Iterable) -> list[str]:
    """Strings of either Python, which a file may name again and again."""
    found, left = [], MOST_TEXT
    for value in values:
        left -= len(value) if isinstance(value, str | bytes) else 0
        if left < 0:
            raise ValueError(f"strings of more than {MOST_TEXT} characters")
        found.append(text(value))
    return found
