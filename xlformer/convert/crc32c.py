"""CRC-32C (Castagnoli) of large arrays: the checksum of TensorFlow's checkpoints.

A CRC is linear, so that a text of 2 m words has the register of one of m words: its
first half, moved on by m words of zeros, xor its second half. numpy does that to all
words of a block at once, and there is no loop over bytes: 1 GB/s (AMD EPYC, one core)
where such a loop would take minutes for a gigabyte.
"""

from __future__ import annotations

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78  # reflected: the lowest bit is the highest power
LEVELS = 18  # a block has 2**LEVELS words, 1 MiB
# Four bytes that bring the register from 0 to all ones, which is where it begins.
BEGIN = np.frombuffer(bytes.fromhex("54641f64"), np.uint8)
MASK_DELTA = 0xA282EAD8


def crc32c(data) -> int:
    """The checksum of bytes, or of the bytes of a contiguous array."""
    found = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data
    found = found.reshape(-1).view(np.uint8)
    block = 4 << LEVELS
    # Zeros in front change nothing, so the first block is the one that is not whole.
    first = found.size % block
    head = np.concatenate([BEGIN, found[:first]])
    level = max(0, (-(-head.size // 4) - 1).bit_length())
    words = np.zeros(4 << level, np.uint8)
    words[words.size - head.size :] = head
    register = words.view("<u4")
    if first != found.size:
        full = np.zeros(1 << LEVELS, "<u4")
        # One word more than a block, where it is BEGIN that does not fit.
        register = _folded(register, LEVELS)
        full[full.size - register.size :] = register
        register = full
        for start in range(first, found.size, block):
            following = found[start : start + block].view("<u4")
            register = _moved(register, LEVELS) ^ following
    return int(_moved(_folded(register, 0), 0)[0]) ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """As it is stored: a checksum of what holds checksums would be a weak one."""
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF


def _folded(register: np.ndarray, level: int) -> np.ndarray:
    """A register of 2**k words as one of 2**level at most."""
    while register.size > 1 << level:
        half = register.size // 2
        moved = _moved(register[:half], half.bit_length() - 1)
        register = moved ^ register[half:]
    return register


def _moved(register: np.ndarray, level: int) -> np.ndarray:
    """The register behind 2**level words of zeros."""
    low, high = _tables(level)
    return low[register & 0xFFFF] ^ high[register >> 16]


@functools.cache
def _tables(level: int) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of the lower and of the upper half of a word."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if level:
        images = _moved(_moved(bits, level - 1), level - 1)
    else:
        images = bits
        for _ in range(32):  # One bit of zeros each.
            odd = (images & 1).astype(bool)
            images = images >> 1 ^ np.where(odd, np.uint32(POLYNOMIAL), np.uint32(0))
    return _spanned(images[:16]), _spanned(images[16:])


def _spanned(images: np.ndarray) -> np.ndarray:
    """The xor of every selection of 16 images."""
    table = np.zeros(1, np.uint32)
    for image in images:
        table = np.concatenate([table, table ^ image])
    return table
