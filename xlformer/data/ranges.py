"""Ranges of files: read from a disk, or from an object store ahead of their use."""

from __future__ import annotations

import collections
import functools
import itertools
import os
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from xlformer import storage
from xlformer.errors import UserError, WorthAnotherTry, reason

OPEN_FILES = 256
# Bytes of a file that have one checksum: what is fetched begins and ends with one.
BLOCK = 1 << 16
# Blocks of a file that lie side by side are fetched together, at most so many.
TOGETHER = 16
# Bytes of blocks that are kept, of one split; more where more is asked for at once.
ROOM = 1 << 26
# Blocks of which a read takes hold at a time.
HELD = 256
# Ranges that are fetched at a time: each takes tens of milliseconds, little of it work.
THREADS = 16
# Seconds before a range is tried again; none is after LONGEST of them, because gcsfs
# tries again by itself, too.
PAUSES = (0.5, 1.0, 2.0, 4.0)
LONGEST = 60.0


class Part(NamedTuple):
    """A range of bytes: of which file, from where, how many."""

    file: int
    place: int
    size: int


class Local:
    """Files on a disk; those that were used last stay open."""

    reads_ahead = False  # the kernel does
    waited = 0.0

    def __init__(self, paths: Sequence):
        self._paths = list(paths)
        self._open, self._lock = collections.OrderedDict(), threading.Lock()

    def fill(self, parts: Sequence[Part], view: memoryview) -> None:
        """Reads some parts, one after the other, into as many bytes."""
        begin = 0
        for number, place, size in parts:
            self._fill(number, view[begin : begin + size], place)
            begin += size

    def _fill(self, number: int, view: memoryview, place: int) -> None:
        path = self._paths[number]
        with self._lock:
            file = self._open.pop(number, None)
            if file is None:
                if len(self._open) >= OPEN_FILES:
                    self._open.popitem(last=False)[1].close()
                file = open(path, "rb", buffering=0)  # noqa: SIM115
            self._open[number] = file  # the last one that was used
            if os.preadv(file.fileno(), [view], place) != len(view):
                raise UserError(f"{path} is shorter than it was")

    def __del__(self):
        for file in getattr(self, "_open", {}).values():
            file.close()


class Stored(NamedTuple):
    """A file of an object store, and the crc32 of each of its blocks."""

    path: str
    size: int
    crc32: str  # 8 hexadecimal digits of each


class Remote:
    """Files of an object store, read in blocks that are kept for a while.

    What is asked for is fetched by other threads, and who reads it waits for no more
    than is not there yet. Each block is compared with its checksum. Nothing depends on
    what is kept.

    Args:
      files: where the parts are.
      fetch: gives bytes `start` to `stop` of a path.

    Attributes:
      waited: seconds for which readers have waited.
      fetched: bytes.
    """

    reads_ahead = True

    def __init__(
        self,
        files: Sequence[Stored],
        fetch: Callable[[str, int, int], bytes] = storage.read_range,
    ):
        self._files, self._fetch = list(files), fetch
        self._blocks: collections.OrderedDict[tuple[int, int], Future] = (
            collections.OrderedDict()
        )
        self._room, self._lock = ROOM // BLOCK, threading.Lock()
        self.waited, self.fetched = 0.0, 0

    def fill(self, parts: Sequence[Part], view: memoryview) -> None:
        """Reads some parts, one after the other, into as many bytes."""
        # Each part is a row, whose next read begins in the block where this one ends.
        self._make_room(len(parts))
        begin, pieces = 0, (piece for part in parts for piece in _cut(part))
        while held := list(itertools.islice(pieces, HELD)):
            blocks = self._asked([key for key, _, _ in held], ahead=False)
            for key, first, size in held:
                block = self._result(blocks[key])
                view[begin : begin + size] = block[first : first + size]
                begin += size

    def ask(self, parts: Sequence[Part], *, ahead: bool) -> None:
        """Has the parts fetched; ahead: after what somebody waits for."""
        keys = list(dict.fromkeys(key for part in parts for key, _, _ in _cut(part)))
        self._make_room(len(keys))
        self._asked(keys, ahead=ahead)

    def _make_room(self, blocks: int) -> None:
        # With less, what was read ahead would be gone before it is used.
        with self._lock:
            self._room = max(self._room, 2 * blocks)

    def _asked(self, keys: list, *, ahead: bool) -> dict[tuple[int, int], Future]:
        """The blocks of these keys, which are there or on their way."""
        found, missing = dict.fromkeys(keys), []
        with self._lock:
            for key in found:
                future = self._blocks.pop(key, None)
                # What has failed is tried again by the next who needs it.
                if future is None or future.done() and future.exception():
                    future = Future()
                    missing.append((key, future))
                found[key] = self._blocks[key] = future  # the last that was used
            while len(self._blocks) > self._room:
                self._blocks.popitem(last=False)
        for run in _runs(missing):
            _work(functools.partial(self._load, run), ahead=ahead)
        return found

    def _result(self, future: Future) -> bytes:
        if future.done():
            return future.result()
        begin = time.perf_counter()
        try:
            return future.result()
        finally:
            with self._lock:
                self.waited += time.perf_counter() - begin

    # In other threads -----------------------------------------------------------------

    def _load(self, run: list[tuple[tuple[int, int], Future]]) -> None:
        """Fetches blocks that lie side by side; what goes wrong is their result."""
        (number, first), _ = run[0]
        try:
            blocks = self._verified(self._files[number], first, len(run))
        except Exception as error:  # raised where it is read
            for _, future in run:
                future.set_exception(error)
        else:
            for (_, future), block in zip(run, blocks, strict=True):
                future.set_result(block)

    def _verified(self, file: Stored, first: int, count: int) -> list[bytes]:
        for _ in range(2):  # once more: it may have been spoilt on its way
            data = self._whole(file, first * BLOCK, (first + count) * BLOCK)
            blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
            sums = file.crc32[8 * first : 8 * (first + count)]
            if checksums(blocks) == sums:
                return blocks
        start = first * BLOCK
        raise UserError(
            f"{file.path}: bytes {start} to {start + len(data)} do not match their "
            f"checksums: delete {os.path.dirname(file.path)} and prepare again"
        )

    def _whole(self, file: Stored, start: int, stop: int) -> bytes:
        stop = min(stop, file.size)
        begin, tries = time.monotonic(), 0
        for pause in (*PAUSES, None):
            tries += 1
            try:
                data = self._fetch(file.path, start, stop)
                with self._lock:
                    self.fetched += len(data)
                if len(data) == stop - start:
                    return data
                why = f"{len(data)} bytes came"
            except FileNotFoundError:
                raise UserError(f"{file.path} is not there any more") from None
            # Errors of the network and of credentials have no common class.
            except Exception as error:
                why = reason(error)
            if pause is None or time.monotonic() - begin > LONGEST:
                break
            time.sleep(pause)
        raise WorthAnotherTry(
            f"{file.path}: bytes {start} to {stop} cannot be read, tried {tries} "
            f"times: {why}"
        )


def checksums(blocks) -> str:
    """The crc32 of each block in 8 hexadecimal digits."""
    return "".join(f"{zlib.crc32(block):08x}" for block in blocks)


def _cut(part: Part) -> Iterator[tuple[tuple[int, int], int, int]]:
    """(file and number of the block, where in it, how many bytes) of a part."""
    place, end = part.place, part.place + part.size
    while place < end:
        number, first = divmod(place, BLOCK)
        size = min(BLOCK - first, end - place)
        yield (part.file, number), first, size
        place += size


def _runs(missing: list) -> Iterator[list]:
    """Cuts a list of (key, ...) into runs of blocks that lie side by side."""
    run: list = []
    for one in missing:
        file, number = one[0]
        if run and (run[-1][0] != (file, number - 1) or len(run) == TOGETHER):
            yield run
            run = []
        run.append(one)
    if run:
        yield run


# The threads are those of the process, and end with it: a pool's would be waited for at
# the exit, with all the pauses of a store that does not answer.
_jobs: queue.PriorityQueue = queue.PriorityQueue()
_count = itertools.count()


def _work(job: Callable[[], None], *, ahead: bool) -> None:
    _begin()
    _jobs.put((ahead, next(_count), job))


@functools.cache
def _begin() -> None:
    for number in range(THREADS):
        name = f"ranges-{number}"
        threading.Thread(target=_serve, name=name, daemon=True).start()


def _serve() -> None:
    while True:
        _, _, job = _jobs.get()
        job()
        del job  # which holds its reader, and all that this keeps
