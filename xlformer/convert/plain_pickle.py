"""Reads what a pickle holds without unpickling it.

    found = plain_pickle.read("cache.pkl", {"vocabulary.Vocab": plain_pickle.INSTANCE})

The opcodes are read here, one after another, and nothing is imported and nothing is
called, whatever the file names. A name that is not in the caller's list is refused.
Lists, tuples, strings and numbers are made as they are; dicts become Pairs, whose keys
are never hashed; objects become Instance; what is long or of no use, such as the tokens
of a corpus, is passed over and becomes Skipped.

A hostile file gets neither time nor memory without end: operations are counted, and so
is what they make. None copies what is there already, so that a small file cannot stand
for a large one; none goes down into it, so that depth and circles cost nothing.
"""

from __future__ import annotations

import codecs
import mmap
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

from xlformer.convert.plain_values import Call, Instance, Name, Pairs, Skipped, text
from xlformer.errors import UserError

# What the names of a pickle stand for.
INSTANCE, PAIRS, ENCODE, SKIPPED, REBUILD = "instance", "pairs", "encode", "skip", "new"
CALL, NAME = "call", "name"  # becomes a Call; is never called
# lm1b's 793,471 words take 5 million operations, or 8 million written by Python 2.
MOST_OPERATIONS = 16_000_000
MOST_MEMORY = 1 << 29  # bytes for strings and containers, of which lm1b's need a third
CONTAINER = 128  # bytes of an empty one, and of what it takes to find it
MEMO = 64  # bytes of remembering something by a number
LONGEST = 1 << 16  # of a string that is kept


class UnknownName(ValueError):
    """The file names something that its caller does not list."""


def read(path: str | pathlib.Path, roles: Mapping[str, str]) -> Any:
    """What the pickle at a path holds.

    Args:
      path: of a file.
      roles: 'module.name' to what it stands for; no other name is taken.

    Raises:
      UserError: it cannot be read, is no whole pickle, or names anything else.
    """
    if pathlib.Path(path).exists() and not pathlib.Path(path).is_file():
        raise UserError(f"{path}: not a pickle that is read here: it is not a file")
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return parse(data, roles)[0]
    # An empty file cannot be mapped: a ValueError.
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a pickle that is read here: {error}") from error


def parse(
    data,
    roles: Mapping[str, str],
    start: int = 0,
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """What the pickle in bytes or a map of a file holds, and where it ends.

    It begins at `start`; `persistent` makes what stands for the id of an object outside
    of it, which is refused without. Raises ValueError, UnknownName for a name.
    """
    reader = _Reader(data, roles, start, persistent)
    return reader.run(), reader.at


class _Reader:
    """The machine that a pickle is a program for, without its calls."""

    def __init__(self, data, roles: Mapping[str, str], start, persistent):
        self.data, self.roles, self.at = data, roles, start
        self.persistent = persistent
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.left = MOST_MEMORY

    def run(self):
        data, size = self.data, len(self.data)
        for _ in range(MOST_OPERATIONS):
            if self.at >= size:
                raise ValueError("it ends before its end")
            code = data[self.at]
            self.at += 1
            if code == ord("."):
                return self.pop()
            step = STEPS.get(code)
            if step is None:
                raise ValueError(f"opcode {bytes([code])!r} at byte {self.at - 1}")
            step(self)
        raise ValueError(f"more than {MOST_OPERATIONS} operations")

    # Bytes of the file.

    def take(self, count: int) -> bytes:
        self.skip(count)
        return self.data[self.at - count : self.at]

    def skip(self, count: int) -> None:
        if not 0 <= count <= len(self.data) - self.at:
            raise ValueError(f"{count} bytes at byte {self.at}, where it ends before")
        self.at += count

    def number(self, form: str) -> Any:
        (found,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return found

    def line(self) -> bytes | None:
        """The bytes before the next newline; None where they are too many."""
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise ValueError(f"a line without an end at byte {self.at}")
        start, self.at = self.at, end + 1
        return None if end - start > LONGEST else self.data[start:end]

    def short_line(self) -> str:
        found = self.line()
        if found is None or len(found) > 256:
            raise ValueError("a name or a number of thousands of characters")
        return found.decode("utf-8")

    def string(self, form: str, convert: Callable = bytes):
        """What stands behind its length."""
        size = self.number(form)
        if size > LONGEST:
            self.skip(size)
            return Skipped()
        return self.kept(convert(self.take(size)))

    def kept(self, found):
        """A new string or container, which is charged for."""
        size = len(found) if isinstance(found, str | bytes) else 0
        self.charge(size + CONTAINER)
        return found

    def charge(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise ValueError(f"more than {MOST_MEMORY} bytes of what would be kept")

    def long(self, size: int) -> int:
        if size > 16:
            raise ValueError(f"an integer of {size} bytes")
        return int.from_bytes(self.take(size), "little", signed=True)

    # The stack.

    def push(self, found) -> None:
        self.stack.append(found)

    def pop(self):
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError(f"nothing to take at byte {self.at}")
        return self.stack.pop()

    def top(self, kind):
        found = self.pop()
        self.stack.append(found)
        if not isinstance(found, kind):
            raise ValueError(f"a {type(found).__name__} at byte {self.at}")
        return found

    def marked(self) -> list:
        """All above the last mark, which are taken from the stack."""
        if not self.marks:
            raise ValueError(f"no mark at byte {self.at}")
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def pairs(self) -> list[tuple]:
        found = self.marked()
        if len(found) % 2:
            raise ValueError(f"a key without a value at byte {self.at}")
        return [self.kept(x) for x in zip(found[::2], found[1::2], strict=True)]

    def several(self, count: int) -> tuple:
        return self.kept(tuple([self.pop() for _ in range(count)][::-1]))

    # What a pickle would import, make and call.

    def named(self, module, name) -> None:
        full = f"{text(module)}.{text(name)}"
        if full not in self.roles:
            raise UnknownName(
                f"it names {full[:100]!r}, and only {', '.join(self.roles)} are taken"
            )
        self.push(Name(full, self.roles[full]))

    def reduce(self) -> None:
        given, name = self.pop(), self.pop()
        if not isinstance(name, Name) or not isinstance(given, tuple):
            raise ValueError(f"a call of what is no function at byte {self.at}")
        self.push(self.called(name, given))

    def called(self, name: Name, given: tuple):
        """What stands for name(*given); no argument is copied."""
        if name.role == CALL:
            return self.kept(Call(name.name, given))
        if name.role == SKIPPED:
            return Skipped()
        if name.role == PAIRS and not given:
            return self.kept(Pairs([]))
        if name.role == PAIRS and len(given) == 1:
            (items,) = given
            if isinstance(items, Pairs):
                return items
            if isinstance(items, list):
                return self.kept(Pairs(items))
        if name.role == ENCODE and len(given) == 2 and text(given[1]) == "latin1":
            if isinstance(given[0], Skipped):
                return given[0]
            return self.kept(text(given[0]).encode("latin-1"))
        if name.role == REBUILD and given and isinstance(given[0], Name):
            name = given[0]
            given = ()
        if name.role == INSTANCE and not given:
            return self.kept(Instance(name.name))
        raise ValueError(f"{name.name} of what it does not take at byte {self.at}")

    def build(self) -> None:
        state = self.pop()
        # An OrderedDict may have attributes, as a state dict of torch has.
        found = self.top((Instance, Skipped, Pairs))
        if isinstance(found, Instance):
            found.state = state

    def outside(self) -> None:
        if self.persistent is None:
            raise ValueError(f"an object outside of it at byte {self.at}")
        self.push(self.kept(self.persistent(self.pop())))

    # The memo.

    def put(self, key: int) -> None:
        self.memo[key] = self.top(object)
        self.charge(MEMO)

    def get(self, key: int) -> None:
        if key not in self.memo:
            raise ValueError(f"nothing was kept as number {key}, at byte {self.at}")
        self.push(self.memo[key])


def _quoted(reader: _Reader):
    found = reader.line()
    if found is None:
        return Skipped()
    found = found.strip()
    if len(found) < 2 or found[:1] not in b"'\"" or found[:1] != found[-1:]:
        raise ValueError(f"a string without quotes before byte {reader.at}")
    return reader.kept(codecs.escape_decode(found[1:-1])[0])


def _raw(reader: _Reader):
    found = reader.line()
    if found is None:
        return Skipped()
    return reader.kept(found.decode("raw-unicode-escape"))


def _whole(line: str):
    # Protocol 0 has no truth values of its own.
    return {"00": False, "01": True}.get(line) if line in ("00", "01") else int(line)


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


STEPS: dict[int, Callable[[_Reader], Any]] = {
    ord(code): step
    for code, step in {
        "\x80": lambda r: r.skip(1),
        "\x95": lambda r: r.skip(8),
        "(": lambda r: r.marks.append(len(r.stack)),
        "0": lambda r: r.pop(),
        "1": lambda r: r.marked(),
        "2": lambda r: r.push(r.top(object)),
        "N": lambda r: r.push(None),
        "\x88": lambda r: r.push(True),
        "\x89": lambda r: r.push(False),
        "K": lambda r: r.push(r.number("<B")),
        "M": lambda r: r.push(r.number("<H")),
        "J": lambda r: r.push(r.number("<i")),
        "I": lambda r: r.push(_whole(r.short_line())),
        "L": lambda r: r.push(int(r.short_line().removesuffix("L"))),
        "\x8a": lambda r: r.push(r.long(r.number("<B"))),
        "\x8b": lambda r: r.push(r.long(r.number("<I"))),
        "F": lambda r: r.push(float(r.short_line())),
        "G": lambda r: r.push(r.number(">d")),
        "S": lambda r: r.push(_quoted(r)),
        "T": lambda r: r.push(r.string("<I")),
        "U": lambda r: r.push(r.string("<B")),
        "B": lambda r: r.push(r.string("<I")),
        "C": lambda r: r.push(r.string("<B")),
        "\x8e": lambda r: r.push(r.string("<Q")),
        "V": lambda r: r.push(_raw(r)),
        "X": lambda r: r.push(r.string("<I", _utf8)),
        "\x8c": lambda r: r.push(r.string("<B", _utf8)),
        "\x8d": lambda r: r.push(r.string("<Q", _utf8)),
        "]": lambda r: r.push(r.kept([])),
        "l": lambda r: r.push(r.kept(r.marked())),
        "a": lambda r: (lambda x: r.top(list).append(x))(r.pop()),
        "e": lambda r: (lambda x: r.top(list).extend(x))(r.marked()),
        ")": lambda r: r.push(()),
        "t": lambda r: r.push(r.kept(tuple(r.marked()))),
        "\x85": lambda r: r.push(r.several(1)),
        "\x86": lambda r: r.push(r.several(2)),
        "\x87": lambda r: r.push(r.several(3)),
        "}": lambda r: r.push(r.kept(Pairs([]))),
        "d": lambda r: r.push(r.kept(Pairs(r.pairs()))),
        "s": lambda r: (lambda x: r.top(Pairs).items.append(x))(r.several(2)),
        "u": lambda r: (lambda x: r.top(Pairs).items.extend(x))(r.pairs()),
        "p": lambda r: r.put(int(r.short_line())),
        "q": lambda r: r.put(r.number("<B")),
        "r": lambda r: r.put(r.number("<I")),
        "\x94": lambda r: r.put(len(r.memo)),
        "g": lambda r: r.get(int(r.short_line())),
        "h": lambda r: r.get(r.number("<B")),
        "j": lambda r: r.get(r.number("<I")),
        "c": lambda r: r.named(r.short_line(), r.short_line()),
        "\x93": lambda r: r.named(*r.several(2)),
        "R": _Reader.reduce,
        "\x81": _Reader.reduce,  # A class and the arguments of its __new__.
        "b": _Reader.build,
        "Q": _Reader.outside,
    }.items()
}
