"""A batch as a pure function of one integer: rows of contiguous text.

Row b of the global batch owns tokens [b*L, (b+1)*L), as the original lays them out, so
segment k+1 of a row follows segment k and a carried state always fits. No state: a
checkpoint needs the step alone, and any host can make any batch.
"""

from __future__ import annotations

import bisect

import numpy as np

from xlformer.data.shards import Tokens
from xlformer.errors import UserError

# Variable lengths as in the original's get_varlen_iter: 5 % of the segments are drawn
# around half of the length, all with a standard deviation of 5 tokens, from 5 tokens to
# three deviations above the length.
SHARE_OF_HALF = 0.05
DEVIATION = 5.0
SHORTEST = 5
LONGEST_EXTRA = 15
# Tokens of each row that are read at a time.
WINDOW = 1 << 12


class Stream:
    """Segments of `tokens` in batch_size rows, of which it makes those in `rows`.

    `documents` are the sorted positions in `tokens` where a document begins. With
    `extended_length` E every segment is preceded by the E tokens before it.
    `variable_length` draws lengths around segment_length; arrays then have the fixed
    width of the longest and are padded on the right. Tokens that do not fill all rows,
    and the end of a row that does not fill a segment, are dropped (a variable length is
    cut to what is left, so it drops nothing).
    """

    def __init__(
        self,
        tokens: np.ndarray | Tokens,
        *,
        batch_size: int,
        segment_length: int,
        extended_length: int = 0,
        documents: np.ndarray | None = None,
        variable_length: bool = False,
        seed: int = 0,
        rows: np.ndarray | None = None,
    ):
        row_length = len(tokens) // batch_size
        if segment_length < 1 or row_length <= segment_length:
            raise UserError(
                f"config.train.segment_length={segment_length} does not fit into a row:"
                f" {len(tokens)} tokens in config.train.batch_size={batch_size} rows"
                f" give rows of {row_length} (one more than a segment is needed)"
            )
        if row_length > np.iinfo(np.int32).max:
            raise UserError(
                f"config.train.batch_size={batch_size} makes rows of {row_length:,}"
                f" tokens; at most {np.iinfo(np.int32).max:,} are possible"
            )
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._begin_B = (self._rows * row_length).tolist()
        self._tokens = tokens
        # Where in each row it begins, and what is read of all rows from there on.
        self._window = 0, np.zeros((len(self._rows), 0), np.int32)
        self._documents = None if documents is None else np.asarray(documents, np.int64)
        self.segment_length = segment_length
        self.extended_length = extended_length
        self.row_length = row_length
        # The last target of a row is one token further than its last input.
        self.steps_per_epoch = (row_length - 1) // segment_length
        self._lengths = None
        self.width = segment_length
        if variable_length:
            self._lengths = _Lengths(segment_length, row_length - 1, seed)
            self.width = segment_length + LONGEST_EXTRA

    @property
    def waited(self) -> float:
        """Seconds for which batches have waited for an object store."""
        return self._tokens.waited if isinstance(self._tokens, Tokens) else 0.0

    def place(self, step: int) -> tuple[int, int, int]:
        """(epoch, offset in each row, valid length) of a step."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        if self._lengths is not None:
            return self._lengths.place(step)
        epoch, segment = divmod(step, self.steps_per_epoch)
        return epoch, segment * self.segment_length, self.segment_length

    def at(self, step: int) -> dict[str, np.ndarray | np.integer]:
        """The batch of a step: inputs_BT, targets_BT, resets_BT, length, epoch, offset.

        inputs_BT has extended_length more columns than targets_BT, on the left.
        resets_BT is [B, 1] (before the segment) unless documents or an extended length
        need one flag for each input.
        """
        epoch, offset, length = self.place(step)
        rows, extended = len(self._rows), self.extended_length
        # The first segments have no, or too few, tokens before them in their row: zeros
        # stand there, and the reset at the row's first token hides them.
        lack = max(extended - offset, 0)
        start, stop = offset - extended + lack, offset + length
        # Every batch has the same shapes, whatever its length: another would compile
        # again.
        inputs_BT = np.zeros((rows, extended + self.width), np.int32)
        targets_BT = np.zeros((rows, self.width), np.int32)
        # Read once: the targets are the inputs from the second on, and one more.
        read_BT = self._read(start, stop + 1)
        inputs_BT[:, lack : extended + length] = read_BT[:, :-1]
        targets_BT[:, :length] = read_BT[:, read_BT.shape[1] - length :]
        return {
            "inputs_BT": inputs_BT,
            "targets_BT": targets_BT,
            "resets_BT": self.resets(step),
            "length": np.int32(length),
            "epoch": np.int32(epoch),
            "offset": np.int32(offset),
        }

    def resets(self, step: int) -> np.ndarray:
        """resets_BT of a step, for a caller who does not need its tokens."""
        _, offset, length = self.place(step)
        lack = max(self.extended_length - offset, 0)
        start = offset - self.extended_length + lack
        return self._resets(offset, lack, start, offset + length)

    def _read(self, start: int, stop: int) -> np.ndarray:
        first, window_BL = self._window
        if not first <= start <= stop <= first + window_BL.shape[1]:
            # Steps follow each other: a call of the system for each row of each step
            # takes far longer (64 rows of 128: 142 us, and 8 us this way).
            length = min(max(stop - start, WINDOW), self.row_length - start)
            starts = [begin + start for begin in self._begin_B]
            if isinstance(self._tokens, Tokens):
                window_BL = self._tokens.rows(starts, length)
                self._ask(self._tokens, start + length, length)
            else:
                window_BL = np.stack([self._tokens[x : x + length] for x in starts])
            first, self._window = start, (start, window_BL)
        return window_BL[:, start - first : stop - first]

    def _ask(self, tokens: Tokens, place: int, length: int) -> None:
        """Has what the next steps need fetched while this one is computed."""
        length, begins = max(tokens.block, length), self._begin_B
        # No further than to the end of the row: what follows is another host's.
        left = self.row_length - place
        tokens.ahead([begin + place for begin in begins], min(length, left))
        if left <= length:  # the next epoch
            tokens.ahead(begins, min(length, self.row_length))

    def _resets(self, offset: int, lack: int, start: int, stop: int) -> np.ndarray:
        rows = len(self._rows)
        if self._documents is None and not self.extended_length:
            return np.full((rows, 1), offset == 0)
        resets_BT = np.zeros((rows, self.extended_length + self.width), bool)
        if offset <= self.extended_length:
            # The row's first token, wherever it comes: a reset counts for the memory
            # in the segment whose inputs up to there are remembered.
            resets_BT[:, lack] = True
        if self._documents is not None:
            base = self._rows * self.row_length
            low = np.searchsorted(self._documents, base + start)
            high = np.searchsorted(self._documents, base + stop)
            for row in np.flatnonzero(high > low):
                begins = self._documents[low[row] : high[row]] - base[row] - start
                resets_BT[row, lack + begins] = True
        return resets_BT


class _Lengths:
    """The schedule of variable lengths: seeded by epoch, so any step can be computed.

    Known epochs are kept; they depend on nothing but (seed, epoch).
    """

    def __init__(self, base: int, total: int, seed: int):
        self._base, self._total, self._seed = base, total, seed
        self._ends: list[np.ndarray] = []  # of each epoch: where its segments end
        self._steps = [0]  # the first step of each epoch, and of the one after the last

    def place(self, step: int) -> tuple[int, int, int]:
        while self._steps[-1] <= step:
            ends = self._draw(len(self._ends))
            self._ends.append(ends)
            self._steps.append(self._steps[-1] + len(ends))
        epoch = bisect.bisect_right(self._steps, step) - 1
        ends, segment = self._ends[epoch], step - self._steps[epoch]
        offset = int(ends[segment - 1]) if segment else 0
        return epoch, offset, int(ends[segment]) - offset

    def _draw(self, epoch: int) -> np.ndarray:
        # random_raw is fixed for all versions of numpy, Generator.normal is not, and a
        # resumed run must draw the same lengths. Seeds may be negative, keys may not.
        bits = np.random.Philox(key=[self._seed & 0xFFFFFFFFFFFFFFFF, epoch])
        block = 3 * (self._total // self._base + 16)
        ends = np.zeros(1, np.int64)
        while ends[-1] < self._total:
            # 53 bits are what a double holds: u lies in [0, 1).
            u = (bits.random_raw(block) >> np.uint64(11)).reshape(-1, 3) * 2.0**-53
            mean = np.where(u[:, 0] < SHARE_OF_HALF, self._base / 2, self._base)
            # Box and Muller (1958); the logarithm of 1 - u, because u may be 0.
            normal = np.sqrt(-2 * np.log1p(-u[:, 1])) * np.cos(2 * np.pi * u[:, 2])
            lengths = (mean + DEVIATION * normal).astype(np.int64)
            lengths = np.clip(lengths, SHORTEST, self._base + LONGEST_EXTRA)
            ends = np.concatenate([ends, ends[-1] + np.cumsum(lengths)])
        ends = ends[1:]
        ends = ends[: int(np.searchsorted(ends, self._total)) + 1]
        # What is left of the row is the last segment, as in the original.
        ends[-1] = self._total
        return ends
