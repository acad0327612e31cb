"""What is to be prepared: a config's data section, checked and read."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

from xlformer import fields
from xlformer.data import archives, lists, local, pieces, sources, trained
from xlformer.data.corpus import Corpus
from xlformer.data.documents import Text
from xlformer.data.prepared import FORMAT
from xlformer.data.vocabulary import ByteVocabulary, Vocabulary, WordVocabulary
from xlformer.errors import UserError

# How often a word of one's own text must occur to have a symbol, if nothing is said.
OWN_MIN_COUNT = 2
# The symbols before the words of one's own text; public corpora bring their own <unk>.
OWN_SPECIALS = ("<eos>", "<unk>")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is to be prepared, and what its folder's name must tell apart."""

    name: str
    unit: str
    newline: str
    every_byte: bool  # Also those that a public corpus has not; others have them.
    documents: bool
    min_count: int  # Of own words, which have <unk>; others keep every symbol.
    max_vocab: int
    tokenizer: pieces.PieceVocabulary | None
    # In its place the name of one that is trained on train: sentencepiece:N.
    trained: str
    # Of config.data.vocab_file, or of a corpus whose symbols are known.
    vocabulary: Vocabulary | None
    corpus: Corpus | None  # None for a text of this machine.
    source: dict  # Tells one raw text from another.
    read: Callable[[object], Text]  # Takes a TFDS download manager.

    @property
    def lines(self) -> bool:
        """Whether `<eos>` at each line's end counts as a word."""
        if self.corpus:
            return self.corpus.lines
        if self.trained:
            return True
        return self.tokenizer.line_ends if self.tokenizer else self.own_words

    @property
    def eos(self) -> str:
        """What stands for the end of a line where words are tokens."""
        return self.corpus.specials[0] if self.corpus else OWN_SPECIALS[0]

    @property
    def begins(self) -> bool:
        """Whether a text begins with a token that is no word of it."""
        return bool(self.corpus and self.corpus.begins and self.unit == "words")

    @property
    def counts_unknown(self) -> bool:
        """Whether unknown words are of our making: others are in the published text."""
        return self.corpus is None or bool(self.corpus.unknown)

    @property
    def has_records(self) -> bool:
        """Whether documents are of one length, and rows hold whole ones."""
        return bool(self.corpus and self.corpus.record)

    @property
    def own_words(self) -> bool:
        return self.unit == "words" and self.corpus is None

    def key(self) -> dict:
        model = self.tokenizer.model if self.tokenizer else ""
        key = {
            "source": self.source,
            "unit": self.unit,
            "newline": self.newline,
            "documents": self.documents,
            "tokenizer": hashlib.sha256(model.encode()).hexdigest(),
            "format": FORMAT,
        }
        # What 0.1.0 did too keeps the name that 0.1.0 gave it.
        if (self.min_count, self.max_vocab) != (1, 0):
            key |= {"min_count": self.min_count, "max_vocab": self.max_vocab}
        if self.every_byte:
            key["alphabet"] = "bytes"
        if self.tokenizer and self.tokenizer.newline_id is not None:
            key["newline_id"] = self.tokenizer.newline_id
        if self.tokenizer and not self.tokenizer.line_ends:
            # 0.1.0 counted line ends as words all the same: its folder has other cards.
            key["line_ends"] = False
        if self.trained:
            key["tokenizer"] = self.trained
        if self.corpus and (tokens := self.corpus.tokens()):
            key["corpus"] = tokens
        if isinstance(self.vocabulary, WordVocabulary):
            listed = "\n".join(self.vocabulary.symbols)
            key["vocabulary"] = hashlib.sha256(listed.encode()).hexdigest()
        return key


def check(data) -> None:
    """Raises UserError for a data section that none can prepare; looks for no text.

    A corpus that is not known may stand in a config: plan and bench need no text.
    """
    fields.check_section("data", data)
    corpus = sources.CORPORA.get(data.corpus)
    unit = corpus.unit if corpus else data.unit
    unit = "bytes" if data.corpus == "stdlib" else unit
    # 'bytes' is the default of config.data.unit, which cannot be told from one that a
    # person gave: no corpus refuses it.
    if data.unit not in ("bytes", unit):
        raise UserError(
            f"config.data.unit={data.unit} is of config.data.corpus=text; {data.corpus}"
            f" has {unit}"
        )
    counted = [c for c in sources.CORPORA.values() if not c.symbols]
    dropping = [c.name for c in counted if c.unit == "bytes"]
    if data.newline == "drop" and (data.corpus not in dropping or data.tokenizer):
        line = f"config.data.newline=drop is for the bytes of {', '.join(dropping)}"
        raise UserError(line)
    _check_alphabet(data, unit)
    has_documents = data.corpus == "text" or (corpus and corpus.documents)
    if (data.path and data.corpus != "text") or (data.documents and not has_documents):
        made = ", ".join(n for n, c in sources.CORPORA.items() if c.documents)
        raise UserError(
            "config.data.path and .documents need config.data.corpus=text; documents,"
            f" but no path, are of {made} too"
        )
    trained.is_named(data.tokenizer)  # or why it is not well named
    if data.vocab_file and not (corpus and corpus.unknown and not data.tokenizer):
        with_words = ", ".join(n for n, c in sources.CORPORA.items() if c.unknown)
        line = f"config.data.vocab_file={data.vocab_file} is for the words of"
        pieces_ = f", not with config.data.tokenizer={data.tokenizer}"
        raise UserError(f"{line} {with_words}{pieces_ * bool(data.tokenizer)}")
    if _counts_own_words(data):
        return
    for name, free in (("min_count", (0, 1)), ("max_vocab", (0,))):
        # A min_count of 1 is what is done with every other text anyway.
        if data[name] not in free:
            unit = "pieces" if data.tokenizer else data.unit
            raise UserError(
                f"config.data.{name}={data[name]} is for the words of your own text"
                " (corpus=text, unit=words, no tokenizer); config.data.corpus is"
                f" {data.corpus}" + f", its unit {unit}" * (data.corpus == "text")
            )


def _check_alphabet(data, unit: str) -> None:
    corpus = sources.CORPORA.get(data.corpus)
    if corpus and corpus.symbols and (data.tokenizer or data.alphabet != "counted"):
        raise UserError(
            f"config.data.tokenizer and .alphabet: the {len(corpus.symbols)} symbols of"
            f" {data.corpus} are fixed"
        )
    if data.alphabet == "counted":
        return
    shown = f"config.data.alphabet={data.alphabet}"
    if data.tokenizer:
        raise UserError(f"{shown} with config.data.tokenizer: its pieces are no bytes")
    # Where characters stand between spaces, or words are symbols, bytes are others.
    ours = [
        name
        for name, corpus in sources.CORPORA.items()
        if corpus.unit in ("bytes", "chars") and not (corpus.spaced or corpus.symbols)
    ]
    if data.corpus not in ours and unit != "bytes":
        raise UserError(
            f"{shown} is for the bytes of {', '.join(ours)}, stdlib and your own text; "
            f"{data.corpus} has {unit}"
        )
    if data.newline == "drop":
        raise UserError(
            f"{shown} with config.data.newline=drop, which leaves one of the bytes out"
        )


def tokenizer_of(data) -> str:
    """What config.data.tokenizer says, or the corpus where that says nothing."""
    corpus = sources.CORPORA.get(data.corpus)
    return data.tokenizer or (corpus.pieces if corpus else "")


def _counts_own_words(data) -> bool:
    return data.corpus == "text" and data.unit == "words" and not data.tokenizer


def recipe(data) -> Recipe:
    """Reads the tokenizer and a text of this machine, but downloads nothing."""
    check(data)
    name, unit, corpus = data.corpus, data.unit, None
    tokenizer, named, listed = None, "", None
    wanted = tokenizer_of(data)
    if trained.is_named(wanted):
        named = wanted
    elif wanted:
        tokenizer = pieces.load_tokenizer(wanted)
    text = raw_text(data)
    if name == "text":
        source = {"text": local.fingerprint(text)}
    elif name == "stdlib":
        unit = "bytes"
        # The library of another Python is another text.
        source = {"stdlib": local.fingerprint(text), **text.facts}
    else:
        corpus = sources.public(name)
        unit, source = corpus.unit, corpus.source()
        if corpus.free and data.manual_dir:
            source["manual_dir"] = archives.listed(data.manual_dir)
        if corpus.part and data.manual_dir:
            source |= corpus.part(data.manual_dir)
        if corpus.symbols:
            listed = _fixed(corpus)
        elif data.vocab_file:
            listed = lists.read(data.vocab_file, corpus)
        unit = "bytes" if data.alphabet == "bytes" else unit
    read = (
        (lambda dl: sources.read(corpus, dl, data.manual_dir))
        if corpus
        else (lambda dl: text)
    )
    # Own words that stand once in train become `<unk>` by default, or it would never be
    # trained; elsewhere every symbol is kept, as the fields of the public corpora do.
    own_words = _counts_own_words(data)
    floor = corpus.min_count if corpus else 1
    return Recipe(
        name=name,
        unit="pieces" if wanted else unit,
        newline=getattr(listed, "newline", data.newline),
        every_byte=corpus is not None and data.alphabet == "bytes",
        documents=data.documents,
        min_count=(data.min_count or OWN_MIN_COUNT) if own_words else floor,
        max_vocab=data.max_vocab if own_words else 0,
        tokenizer=tokenizer,
        trained=named,
        vocabulary=listed,
        corpus=corpus,
        source=source,
        read=read,
    )


def _fixed(corpus: Corpus) -> ByteVocabulary:
    """The symbols of a corpus in its own order; what stands between lines is none."""
    symbols = [ord(symbol) for symbol in corpus.symbols]
    newline = "drop" if corpus.line_documents else "keep"
    return ByteVocabulary(symbols, [0] * len(symbols), newline)


def raw_text(data) -> Text | None:
    """A text of this machine, as it is prepared; None where it is a public corpus."""
    if data.corpus == "stdlib":
        return local.read_stdlib()
    if data.corpus != "text":
        return None
    split_by = "pieces" if data.tokenizer and data.unit != "words" else data.unit
    return local.read_files(data.path, split_by)
