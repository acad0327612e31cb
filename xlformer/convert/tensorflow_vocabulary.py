"""The vocabulary of the TensorFlow original: its cache.pkl, a pickled corpus."""

from __future__ import annotations

import pathlib

from xlformer.convert import plain_pickle, vocab
from xlformer.convert.plain_values import Instance, Pairs, text, texts
from xlformer.data.vocabulary import Vocabulary
from xlformer.errors import UserError

CORPUS, VOCAB = "data_utils.Corpus", "vocabulary.Vocab"
# All that the program's pickles name, and what protocols 0 and 1 make objects with.
ROLES = {
    CORPUS: plain_pickle.INSTANCE,
    VOCAB: plain_pickle.INSTANCE,
    "collections.Counter": plain_pickle.PAIRS,
    "collections.OrderedDict": plain_pickle.PAIRS,
    "numpy.core.multiarray._reconstruct": plain_pickle.SKIPPED,
    "numpy._core.multiarray._reconstruct": plain_pickle.SKIPPED,
    "numpy.ndarray": plain_pickle.SKIPPED,
    "numpy.dtype": plain_pickle.SKIPPED,
    "_codecs.encode": plain_pickle.ENCODE,
    "copy_reg._reconstructor": plain_pickle.REBUILD,
    "copyreg._reconstructor": plain_pickle.REBUILD,
    "__builtin__.object": plain_pickle.SKIPPED,
    "builtins.object": plain_pickle.SKIPPED,
}


def beside(prefix: pathlib.Path) -> str | None:
    """The vocabulary that lies beside a checkpoint, or in ../data as it is released."""
    places = prefix.parent / "cache.pkl", prefix.parent.parent / "data" / "cache.pkl"
    return next((str(path) for path in places if path.is_file()), None)


def read(path: str | pathlib.Path) -> Vocabulary:
    """The vocabulary of a cache.pkl, with the ids that the file gives.

    A recount would not do: words of one count stand in the order of the dict of the
    Python that counted them. Raises UserError.
    """
    found = plain_pickle.read(path, ROLES)
    try:
        dataset = None
        if isinstance(found, Instance) and found.name == CORPUS:
            corpus = found.attributes()
            dataset, found = corpus.get("dataset"), corpus.get("vocab")
        if not isinstance(found, Instance) or found.name != VOCAB:
            raise ValueError(f"it holds neither a {CORPUS} nor a {VOCAB}")
        fields = found.attributes()
        symbols, counter = _symbols(fields), _counter(fields)
        if dataset is not None and text(dataset) == "enwik8":
            # Whatever its numbers look like: those of one digit could be characters.
            counts = [counter.get(symbol, 0) for symbol in symbols]
            return vocab.of_bytes([int(symbol) for symbol in symbols], counts)
    except ValueError as error:
        line = f"{path}: not the vocabulary of the TensorFlow original: {error}"
        raise UserError(line) from error
    lower = fields.get("lower_case") is True
    plain = {"idx2sym": symbols, "counter": counter, "lower_case": lower}
    return vocab.of_vocab(plain, str(path))


def _symbols(fields: dict) -> list[str]:
    """In the order of their ids, which both of its lists must agree on."""
    listed, numbered = fields.get("idx2sym"), fields.get("sym2idx")
    if not isinstance(listed, list) or not listed:
        raise ValueError("it has no list idx2sym of symbols")
    if not isinstance(numbered, Pairs):
        raise ValueError("it has no sym2idx")
    symbols, ids = texts(listed), numbered.fields()
    if len(ids) != len(symbols):
        raise ValueError(f"{len(symbols)} symbols in idx2sym, {len(ids)} in sym2idx")
    for i, symbol in enumerate(symbols):
        # Never shown by repr: what is no number may be of any size there.
        if type(ids.get(symbol)) is not int or ids[symbol] != i:
            raise ValueError(f"sym2idx has another number for {symbol[:40]!r} than {i}")
    return [_word(symbol) for symbol in symbols]


def _counter(fields: dict) -> dict[str, int]:
    counter = fields.get("counter")
    if not isinstance(counter, Pairs):
        return {}
    return {_word(symbol): count for symbol, count in counter.fields().items()}


def _word(symbol: str) -> str:
    """The symbol, or a stand-in for one that has white space of Unicode.

    Python 2 cut bytes at the white space of ASCII alone. No word of a text that is cut
    by us is such a symbol, so that its name does not matter, only its number.
    """
    if symbol.split() == [symbol] or not symbol:
        return symbol
    return symbol.encode("unicode_escape").decode("ascii").replace(" ", "\\x20")
