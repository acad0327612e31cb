"""Files that list the symbols of a vocabulary: those that a corpus was published with.

A line each, of which only the first word counts (One Billion Word's has a number behind
it). The order is kept: adaptive cutoffs rely on it.
"""

from __future__ import annotations

import io

from xlformer import storage, strangers
from xlformer.data.corpus import Corpus
from xlformer.data.vocabulary import WordVocabulary
from xlformer.errors import UserError


def read(path: str, corpus: Corpus) -> WordVocabulary:
    """The words of such a file as the vocabulary of a corpus."""
    where = f"config.data.vocab_file={path}"
    try:
        file = io.BytesIO(strangers.read(storage.path(path), strangers.MOST_OF_TEXT))
        # As text, which has more kinds of white space than bytes have.
        lines = [line.decode("utf-8-sig").split(maxsplit=1)[:1] for line in file]
        # Twice the same word is once, as in the original.
        words = dict.fromkeys(word for line in lines for word in line)
    except UnicodeDecodeError:
        raise UserError(f"{where}: it is no UTF-8 text") from None
    except Exception as error:
        raise storage.unreadable(f"{where}: cannot be read", path, error) from error
    for symbol in (corpus.specials[0], corpus.unknown):
        if symbol not in words:
            line = f"{where}: {symbol} is not among its {len(words)} words"
            raise UserError(line)
    options = {"eos": corpus.specials[0], "unknown": corpus.unknown}
    return WordVocabulary(
        list(words),
        [0] * len(words),
        lower=corpus.lower,
        begins=corpus.begins,
        **options,
    )
