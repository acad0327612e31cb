"""LevelDB's tables: sorted keys and their values in one file, read with distrust.

Blocks of entries whose keys share their beginnings with the one before, an index block
of where the blocks lie, and a footer that says where that is. Behind each block a byte
says how it is packed, and a masked CRC-32C follows. The file is a stranger's: each
offset and size is held against what is there before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator

from xlformer.convert.crc32c import crc32c, masked

MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER = 48
TRAILER = 5  # of a block: how it is packed, and its checksum
MOST = 1 << 26  # bytes of a file, and of all its keys written out
ENTRY = 256  # bytes that an entry takes besides, where it is kept


def table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a whole file, in order; ValueError for any other file."""
    if len(data) < FOOTER or data[-8:] != MAGIC:
        raise ValueError("its end is not that of such a table; it may be cut short")
    at = len(data) - FOOTER
    _, _, at = handle(data, at, len(data) - 8)  # Of filters, of which there are none.
    start, size, at = handle(data, at, len(data) - 8)
    before, left, last = 0, MOST, None
    for _, place in entries(block(data, start, size), MOST):
        start, size, _ = handle(place, 0, len(place))
        # Blocks that follow each other are as many as there are, and no more.
        if start < before:
            raise ValueError(f"a block at byte {start} follows one that ends behind it")
        before = start + size + TRAILER
        for key, value in entries(block(data, start, size), left):
            left -= len(key) + ENTRY
            if last is not None and key <= last:
                raise ValueError(f"key {key[:60]!r} does not follow {last[:60]!r}")
            last = key
            yield key, value


def block(data: bytes, start: int, size: int) -> bytes:
    """The entries of a block, whose checksum is true."""
    if start + size + TRAILER > len(data) - FOOTER:
        raise ValueError(f"a block of {size} bytes at {start} is not all there")
    end = start + size
    if masked(crc32c(data[start : end + 1])) != int.from_bytes(
        data[end + 1 : end + TRAILER], "little"
    ):
        raise ValueError(f"the block at byte {start} has another checksum")
    if data[end]:
        kind = {1: "snappy"}.get(data[end], f"method {data[end]}")
        raise ValueError(
            f"its blocks are compressed ({kind}), which TensorFlow's are not"
        )
    return data[start:end]


def entries(block: bytes, left: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values; `left`: how many bytes the keys may have in all."""
    restarts = int.from_bytes(block[-4:], "little") if len(block) >= 4 else -1
    end = len(block) - 4 - 4 * restarts
    if restarts < 0 or end < 0:
        raise ValueError("a block without its end")
    at, key = 0, b""
    while at < end:
        shared, at = varint(block, at, end)
        own, at = varint(block, at, end)
        size, at = varint(block, at, end)
        if shared > len(key) or own + size > end - at:
            raise ValueError("an entry that is not all there")
        key = key[:shared] + block[at : at + own]
        left -= len(key) + ENTRY
        if left < 0:
            raise ValueError(f"more than {MOST} bytes of keys and entries")
        at += own
        yield key, block[at : at + size]
        at += size


def handle(data: bytes, at: int, end: int) -> tuple[int, int, int]:
    """Where a block begins and how long it is, and the place behind the handle."""
    start, at = varint(data, at, end)
    size, at = varint(data, at, end)
    return start, size, at


def varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the place behind it."""
    found = 0
    for i in range(10):
        if at >= end:
            break
        byte, at = data[at], at + 1
        found |= (byte & 127) << 7 * i
        if byte < 128:
            return found, at
    raise ValueError("a number that is not all there")
