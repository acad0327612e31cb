"""Text as UTF-8: white space, characters, and what is said of wrong bytes."""

from __future__ import annotations

import numpy as np

from xlformer.errors import UserError

# What bytes.split() cuts at.
SPACES = np.frombuffer(b" \t\n\r\x0b\x0c", np.uint8)
IS_SPACE = np.zeros(256, bool)
IS_SPACE[SPACES] = True
# For bytes.translate, which is twice as fast as numpy's indexing.
WHITE = IS_SPACE.tobytes()
# What is said of a file that is none: of any corpus, of which most have no choice.
ANY_FILE = "config.data.corpus=text with unit=bytes takes any file"
ASCII = bytes(range(128))
# All that Unicode has: U+10FFFF is the last.
CODE_POINTS = 0x110000
# What str.split() cuts at, too, in UTF-8: U+3000 is the last.
OTHERS = [chr(i) for i in range(0x3001) if chr(i).isspace() and i not in SPACES]
OTHERS = [space.encode() for space in OTHERS]
CONTROLS = [space for space in OTHERS if len(space) == 1]
# The beginnings of the others, and all of them as numbers of three bytes.
_LEADS = np.isin(np.arange(256), [space[0] for space in OTHERS if len(space) > 1])
LEADS = _LEADS.tobytes()
WIDE = [int.from_bytes(space, "big") for space in OTHERS if len(space) == 3]
NARROW = [space[1] for space in OTHERS if len(space) == 2]  # behind 0xc2


def as_bytes(text: str | bytes) -> bytes:
    """A text in UTF-8; half a surrogate pair, as of a shell, keeps its own bytes."""
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text


def decode_utf8(data: bytes, where: str, base: int = 0, ascii_: bool = True) -> str:
    """Decodes UTF-8; a UserError names the first wrong byte, `base` + its offset.

    ascii_: whether the text before it, which is not given, is ASCII.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        other = "iconv -f LATIN1 -t UTF-8, or from whatever it is, converts the text"
        damaged = "iconv -c -f UTF-8 -t UTF-8 leaves out what is damaged"
        # All ASCII so far: the file is most likely in an older encoding. After valid
        # UTF-8 it is rather damaged.
        remedy = other if ascii_ and data[: error.start].isascii() else damaged
        raise UserError(
            f"{where}: byte {data[error.start]:#04x} at offset {base + error.start} is"
            f" not valid UTF-8: {remedy}; {ANY_FILE}"
        ) from None


class Utf8:
    """Checks that a text which comes in blocks is UTF-8."""

    def __init__(self, where: str):
        self._where, self._rest, self._size, self._ascii = where, b"", 0, True

    def add(self, block: bytes) -> None:
        if not self._rest and block.isascii():
            self._size += len(block)
            return
        data = self._rest + block
        stop = whole_characters(data)
        decode_utf8(data[:stop], self._where, self._size, self._ascii)
        self._rest, self._size = data[stop:], self._size + stop
        self._ascii = self._ascii and data[:stop].isascii()

    def end(self) -> None:
        decode_utf8(self._rest, self._where, self._size, self._ascii)


class Characters:
    """Which characters a text has."""

    def __init__(self):
        self._seen = np.zeros(CODE_POINTS, bool)

    def add(self, data: bytes) -> None:
        """Takes in a text that is UTF-8."""
        for code in np.flatnonzero(~self._seen[:128]).tolist():
            self._seen[code] = code in data
        # Without the ASCII, of which most texts are, the others keep their order.
        others = data.translate(None, ASCII).decode()
        self._seen[code_points(others, "")] = True

    def found(self) -> str:
        return "".join(map(chr, np.flatnonzero(self._seen).tolist()))


def plain_spaces(data: bytes) -> bytes:
    """The same words between ASCII's white space, which bytes.split() knows.

    Words of bytes take half the time of words of str.
    """
    if any(space in data for space in CONTROLS) or _has_wide_space(data):
        for space in OTHERS:
            data = data.replace(space, b" ")
    return data


def _has_wide_space(data: bytes) -> bool:
    if data.isascii():
        return False
    # To look for each of the 19 takes 14 ms/MB, this 1 ms where few characters are.
    places = np.flatnonzero(np.frombuffer(data.translate(LEADS), bool))
    codes = np.frombuffer(data + b"  ", np.uint8)
    first, second = codes[places], codes[places + 1]
    if (np.isin(second, NARROW) & (first == 0xC2)).any():
        return True
    whole = first.astype(np.int32) << 16 | second.astype(np.int32) << 8
    return bool(np.isin(whole | codes[places + 2], WIDE).any())


def whole_characters(data: bytes) -> int:
    """Bytes of data without a character of UTF-8 that has only begun at its end."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:  # 110xxxxx begins two bytes, 1110xxxx three, 11110xxx four.
            needed = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return len(data) - back if needed > back else len(data)
    return len(data)


def code_points(text: str | bytes, where: str, base: int = 0) -> np.ndarray:
    """The characters of text as numbers."""
    text = text if isinstance(text, str) else decode_utf8(text, where, base)
    # Four bytes a character, little-endian on any machine.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
