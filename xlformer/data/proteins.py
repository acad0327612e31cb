"""Proteins of a FASTA file, such as UniProt's TrEMBL, one a line.

A file is gone through once to check and count it, and once for each split: nothing of
it is kept, and it may be compressed.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import gzip
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from xlformer import progress
from xlformer.data import archives, documents
from xlformer.data.archives import Archive, Origin
from xlformer.data.corpus import Corpus
from xlformer.data.documents import BLOCK, Document, Source, Text
from xlformer.errors import UserError, reason, some
from xlformer.fields import SPLITS

ARCHIVE = Archive(
    "uniprot_trembl.fasta.gz",
    (
        "https://ftp.uniprot.org/pub/databases/uniprot/current_release/knowledgebase/"
        "complete/uniprot_trembl.fasta.gz",
    ),
)
# In the order of Google's program (google-research/protein_lm/seq_utils.py): the
# standard residues, and B (D or N), O (pyrrolysine), U (selenocysteine), X (any),
# Z (E or Q).
RESIDUES = "ACDEFGHIKLMNPQRSTVWYBOUXZ"
# Lower case is another way to write a residue; line ends and blanks stand between them.
_UPPER = bytes(range(256)).upper()
_BLANK = b" \t\r\n"
_EITHER = (RESIDUES + RESIDUES.lower()).encode() + _BLANK
# The longest protein of the paper's TrEMBL has 74,488 residues.
LONGEST = 1 << 24
FAMILIES = (
    "PF18369 PF04680 PF17988 PF12325 PF03272 PF03938 PF17724 PF10696 PF11968 PF04153"
    " PF06173 PF12378 PF04420 PF10841 PF06917 PF03492 PF06905 PF15340 PF17055 PF05318"
)
PROTOCOL = (
    "Choromanski et al. 2020, C.1, TrEMBL of 2019: 106,030,080 different sequences,"
    " split at random into 104,863,744 / 102,400 / 1,033,216, after 29,696 of 20 Pfam"
    f" families ({FAMILIES}) were taken out as the set out of distribution (OOD); one"
    " protein a row, clipped at 1,024 residues; for the long task joined with an end"
    " symbol and cut into 8,192. Ours: the split is that of `split_by`; sequences"
    " that come again stay, but equal ones are in one split; a FASTA names"
    " no families, so there is no OOD set, unless its proteins are given as test.fasta;"
    " proteins are whole, and follow each other without a symbol between them"
)
# The number of a sequence, which decides its split, is below this.
SPAN = 1 << 64
# Up to so many proteins a tenth each is validation and test; beyond, what is next to
# the paper's shares.
FEW = 1_000_000
SHARES = {"validation": 0.001, "test": 0.01}
SPLIT_BY = (
    "blake2b of the residues: the {0} of the lowest 64-bit numbers are validation, the"
    " {1} after them test"
)
# Files that are splits already, under one of these names.
GIVEN = {"train": ("train",), "validation": ("valid", "validation"), "test": ("test",)}
ENDINGS = (".fasta", ".fasta.gz")


@dataclasses.dataclass(frozen=True)
class Fasta:
    """A FASTA file, compressed or not."""

    source: Source

    @property
    def name(self) -> str:
        """What it is called in errors."""
        return self.source.name

    def proteins(self, seen: Callable = lambda size: None) -> Iterator[bytes]:
        """Yields the residues of each; UserError for what is no protein.

        seen: is told how many bytes of the file have been read since it was last.
        """
        first = True
        for entry in self._entries(seen):
            header, _, body = entry.partition(b"\n")
            if first and header[:1] != b">":
                raise UserError(
                    f"{self.name}: not a FASTA file: it begins with {_shown(header)!r},"
                    " and not with a header (>...)"
                )
            header, first = header.removeprefix(b">" * first), False
            if other := body.translate(None, _EITHER):
                found = some(repr(chr(byte)) for byte in sorted(set(other)))
                raise UserError(
                    f"{self.name}: >{_shown(header)} has {found}: residues are"
                    f" {RESIDUES}; sequences of UniProt have no gaps (-), no stops (*)"
                )
            residues = body.translate(_UPPER, _BLANK)
            if not residues:
                raise UserError(f"{self.name}: >{_shown(header)} has no residues")
            yield residues

    def _entries(self, seen: Callable) -> Iterator[bytes]:
        """Yields header and sequence of each; but for the first without the '>'."""
        rest = b""
        for block in self._blocks(seen):
            *whole, rest = (rest + block).split(b"\n>")
            yield from whole
            if len(rest) > LONGEST:
                raise UserError(
                    f"{self.name}: {_shown(rest)!r}: an entry of more than"
                    f" {LONGEST:,} bytes is no protein"
                )
        if not rest:
            raise UserError(f"{self.name}: the file is empty")
        yield rest

    def _blocks(self, seen: Callable) -> Iterator[bytes]:
        reader, place = archives.Reader(self.source), 0
        head = b"".join(self.source.pieces(0, min(2, self.source.size)))
        opened = gzip.GzipFile(fileobj=reader) if head == b"\x1f\x8b" else reader
        try:
            while block := opened.read(BLOCK):
                yield block
                seen(reader.tell() - place)
                place = reader.tell()
        except documents.UNREADABLE as error:
            raise UserError(f"{self.name}: cannot be read: {reason(error)}") from None


class Lines(Source):
    """The proteins of a file that belong to a split, a line each.

    belongs: says of a protein's residues whether it does.
    """

    __slots__ = ("_belongs", "_fasta")

    def __init__(self, fasta: Fasta, size: int, belongs: Callable[[bytes], bool]):
        self.name, self.size = fasta.name, size
        self._fasta, self._belongs = fasta, belongs

    def pieces(self, start, stop):
        place, size, lines = 0, 0, []
        for residues in filter(self._belongs, self._fasta.proteins()):
            if place >= stop:
                break
            # Of the whole split nothing is cut.
            line = (residues + b"\n")[max(start - place, 0) : stop - place]
            place += len(residues) + 1
            size += len(line)
            lines.append(line)
            if size >= BLOCK:
                yield b"".join(lines)
                size, lines = 0, []
        yield b"".join(lines)


class Counted:
    """What was seen of a split: proteins, residues, the longest protein."""

    def __init__(self):
        self.proteins = self.residues = self.longest = 0

    def add(self, length: int) -> None:
        self.proteins += 1
        self.residues += length
        self.longest = max(self.longest, length)

    @property
    def size(self) -> int:
        """Bytes, with the end of each line."""
        return self.residues + self.proteins


def number(residues: bytes) -> int:
    """Decides the split of a protein: equal ones are in one split."""
    return int.from_bytes(hashlib.blake2b(residues, digest_size=8).digest(), "big")


def read(origin: Origin) -> Text:
    """The one FASTA file of manual_dir, three that are splits already, or TrEMBL."""
    if origin.folder is None:
        return origin.first(ARCHIVE, read_one)
    names = {x.name for x in origin.folder.iterdir() if x.name.endswith(ENDINGS)}
    given = {
        split: next((s + e for s in stems for e in ENDINGS if s + e in names), "")
        for split, stems in GIVEN.items()
    }
    if any(given.values()):
        if missing := [split for split, name in given.items() if not name]:
            raise UserError(
                f"trembl: {origin.folder} has {some(sorted(names))}, but no"
                f" {GIVEN[missing[0]][0]}.fasta: all three splits, or one file of all"
            )
        return _read_splits(origin, given)
    if len(names) != 1:
        found = some(sorted(names)) or "none"
        raise UserError(
            f"trembl: {origin.folder}: expected one file *{' or *'.join(ENDINGS)}, or"
            f" train, valid and test, found {found}"
        )
    return origin.first(Archive(names.pop()), read_one)


def read_one(source: Source) -> Text:
    """All proteins of one file, split by their sequences."""
    fasta = Fasta(source)
    # Of few proteins the shares are counted; of many they are parts of the span.
    numbers, lengths = array.array("Q"), array.array("Q")
    low = SHARES["validation"], sum(SHARES.values())
    bounds = [int(SPAN * share) for share in low]
    counted = {split: Counted() for split in SPLITS}
    with progress.counting(f"reading {fasta.name}", source.size):
        for residues in fasta.proteins(progress.passed):
            found = number(residues)
            counted[_split(found, bounds)].add(len(residues))
            if len(numbers) <= FEW:
                numbers.append(found)
                lengths.append(len(residues))
    shares = [f"{share:.1%}" for share in SHARES.values()]
    if len(numbers) <= FEW:
        shares, bounds = ["tenth"] * 2, _tenths(numbers, fasta.name)
        counted = {split: Counted() for split in SPLITS}
        for found, length in zip(numbers, lengths, strict=True):
            counted[_split(found, bounds)].add(length)
    parts = {}
    for split, seen in counted.items():
        belongs = functools.partial(_belongs, split=split, bounds=bounds)
        parts[split] = Lines(fasta, seen.size, belongs)
    return _text(parts, counted, SPLIT_BY.format(*shares))


def _read_splits(origin: Origin, names: Mapping[str, str]) -> Text:
    counted = {split: Counted() for split in SPLITS}
    parts = {}
    for split, name in names.items():
        source = documents.source(str(origin.folder / name))
        origin.verified(source, name, "")
        fasta = Fasta(source)
        with progress.counting(f"reading {fasta.name}", source.size):
            for residues in fasta.proteins(progress.passed):
                counted[split].add(len(residues))
        parts[split] = Lines(fasta, counted[split].size, lambda residues: True)
    return _text(parts, counted, f"the files {', '.join(names.values())}")


def _text(parts: Mapping[str, Lines], counted, split_by: str) -> Text:
    for split, found in counted.items():
        if not found.proteins:
            raise UserError(f"{parts[split].name}: no protein is in split {split!r}")
    facts = {
        "split_by": split_by,
        "proteins": {split: found.proteins for split, found in counted.items()},
        "longest": {split: found.longest for split, found in counted.items()},
    }
    splits = {split: [Document(x, 0, x.size)] for split, x in parts.items()}
    return Text(splits, facts)


def _belongs(residues: bytes, *, split: str, bounds: Sequence[int]) -> bool:
    return _split(number(residues), bounds) == split


def _split(found: int, bounds: Sequence[int]) -> str:
    if found >= bounds[1]:
        return "train"
    return "validation" if found < bounds[0] else "test"


def _tenths(numbers: Sequence[int], name: str) -> list[int]:
    different = np.unique(np.array(numbers, np.uint64))
    if len(different) < len(SPLITS):
        raise UserError(
            f"{name}: {len(different)} different proteins are too few: train,"
            " validation and test need one each"
        )
    tenth = max(1, len(different) // 10)
    return [int(different[tenth]), int(different[2 * tenth])]


def _shown(line: bytes) -> str:
    return line.split(b"\n")[0][:40].decode("ascii", "backslashreplace")


CORPUS = Corpus(
    "trembl",
    "bytes",
    (ARCHIVE,),
    read=read,
    protocol=PROTOCOL,
    symbols=RESIDUES,
    documents=True,
    line_documents=True,
    free=True,
)
