"""Vocabularies of texts: what preparing makes of them, without its files."""

from xlformer.data import counting, parts


def bytes(texts, newline="keep", every=True):
    codes = _counted(counting.Codes("bytes"), texts)
    return counting.byte_vocabulary(codes, newline, every)


def chars(texts, where="text"):
    return counting.char_vocabulary(_counted(counting.Codes("chars"), texts, where))


def words(texts, specials=("<eos>",), unit="words", lower=False):
    found = _counted(counting.Words(specials, lower), texts)
    return counting.word_vocabulary(found, 1, 0, unit)


def _counted(counter, texts, where="text"):
    for text in texts:
        for part in parts.of(text):
            counter.add(part, where)
    return counter
