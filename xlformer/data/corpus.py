"""What is said of a public corpus; sources.py has the list of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from xlformer.data.archives import Archive, Origin
from xlformer.data.documents import Text


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A public corpus: what is published of it, and how its field reads that.

    One archive, with one file in it or with one a split, is read by `files` and `cut`.
    A corpus of another form brings a function.

    Attributes:
      name: as config.data.corpus has it.
      unit: bytes, chars or words.
      archives: the files that are published.
      files: path in the archive -> sha256: one, or one a split.
      cut: of one file: the bytes of train and of validation.
      read: in place of these two: the text from wherever it lies. Documents may be
        yielded one by one (Text.expected then); UserError says what is wrong, and how
        to mend it is added.
      protocol: what its figures were measured by, for the card.
      lines: every line ends in a token: the first of `specials`.
      begins: that token stands before the first line of a text, too.
      spaced: characters stand between spaces, and '_' is the space.
      lower: the field lower-cases it.
      specials: symbols that stand before those that are counted.
      unknown: the word that stands for others, '' where its text has it already.
      min_count: how often a word of train must occur to be a symbol.
      symbols: all symbols in their order, where they are known before the text.
      pieces: what config.data.tokenizer is where nobody says it.
      documents: it is made of documents, which config.data.documents tells apart.
      line_documents: every line is one, and its newline no token.
      record: tokens of a document, where all are equal and rows hold whole ones.
      free: what lies under manual_dir may be any files of its form.
      part: of manual_dir: what tells a part of the corpus, if one lies there, from all.
    """

    name: str
    unit: str
    archives: tuple[Archive, ...]
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cut: tuple[int, int] = ()
    read: Callable[[Origin], Text] | None = None
    protocol: str = ""
    lines: bool = False
    begins: bool = False
    spaced: bool = False
    lower: bool = False
    specials: tuple[str, ...] = ("<eos>",)
    unknown: str = ""
    min_count: int = 1
    symbols: str = ""
    pieces: str = ""
    documents: bool = False
    line_documents: bool = False
    record: int = 0
    free: bool = False
    part: Callable[[str], dict] | None = None

    @property
    def archive(self) -> Archive:
        """The only one, or the first."""
        return self.archives[0]

    def source(self) -> dict:
        """Tells its text from others. Folders that 0.1.0 has made are called by it."""
        first, *others = self.archives
        found = {
            "name": self.name,
            "unit": self.unit,
            "archive": first.file,
            "urls": first.urls,
            "archive_sha256": first.sha256,
            "files": dict(self.files),
            "cut": self.cut,
            "lines": self.lines,
            "spaced": self.spaced,
            "lower": self.lower,
        }
        if others:
            found["others"] = [dataclasses.astuple(archive) for archive in others]
        return found

    def tokens(self) -> dict:
        """Tells its tokens from others of the same text, as far as 0.1.0 had none."""
        names = ("begins", "specials", "unknown", "min_count", "symbols")
        names += ("line_documents", "record")
        default = {field.name: field.default for field in dataclasses.fields(self)}
        found = {name: getattr(self, name) for name in names}
        return {k: v for k, v in found.items() if v != default[k]}
