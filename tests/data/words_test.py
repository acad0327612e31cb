"""Words as numbers: the same as a dict that is asked for each word."""

import collections

import numpy as np
import pytest

from xlformer.data import counting, parts, utf8, words
from xlformer.data.vocabulary import WordVocabulary
from xlformer.errors import UserError


def split(part, eos, *, lower=False, close_line=True, begins=False):
    """What the words of a part are, in UTF-8: the definition, word by word."""
    data, end = part.data, eos.encode()
    if lower or not data.isascii():
        text = utf8.decode_utf8(data, "text", part.offset)
        data = text.lower().encode() if lower else data
    found = utf8.plain_spaces(data).replace(b"\n", b" " + end + b" ").split()
    if close_line and part.ends and not data.endswith(b"\n"):
        found.append(end)
    return [end, *found] if begins and not part.offset else found


def texts():
    """Few words and many, short and too long to be remembered, odd bytes and spaces."""
    draw = np.random.default_rng(6)
    spaces = [" ", "  ", "\n", "\t", "\r\n", "\x0b", "\x1d", "\u00a0", "\u3000"]
    odd = [
        "<eos>",
        "<unk>",
        "A",
        "a",
        "a\0",
        "a\0\0",
        "\0",
        "\u00e9\u00c9",
        "\U0001f600",
    ]
    odd += ["x" * size for size in range(words.LONGEST - 2, words.LONGEST + 4)]
    odd += ["x" * words.LONGEST + "\0", "x" * 300, "\u0416" * 12, "\u0416" * 11]
    for count in (0, 1, 2, 40, 1000):
        known = [*odd, *(f"w{i}" for i in range(3 * count))]
        # Not by draw.choice, whose strings lose the NUL bytes at their ends.
        found = [known[i] for i in draw.integers(0, len(known), count)]
        between = [spaces[i] for i in draw.integers(0, len(spaces), count + 1)]
        yield "".join(map("".join, zip(between, [*found, ""], strict=True))).encode()
    yield bytes(draw.integers(0, 128, 5000).tolist())
    yield "".join(map(chr, draw.integers(1, 0x3010, 5000))).encode()


@pytest.mark.parametrize("slots", [18, 2], ids=["room", "no room"])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("begins", [False, True])
def test_they_are_those_of_a_dict(slots, lower, begins, monkeypatch):
    monkeypatch.setattr(words, "SLOTS", slots)
    monkeypatch.setattr(parts, "SIZE", 700)
    specials = ("<eos>", "<unk>")
    counted = counting.Words(specials, lower, begins=begins)
    expected = collections.Counter()
    for text in texts():
        for part in parts.of(text):
            expected.update(split(part, "<eos>", lower=lower, begins=begins))
            counted.add(part, "text")
    # In the order of their first appearance, too, by which ties are broken.
    assert [*counted.counts.items()] == [*expected.items()]
    assert counted.total == expected.total()
    symbols = [w.decode() for w in list(expected)[::2]]
    symbols = [*dict.fromkeys([*specials, *symbols])]
    options = {"lower": lower, "begins": begins}
    known = WordVocabulary(symbols, [0] * len(symbols), **options)
    ids = {symbol.encode(): i for i, symbol in enumerate(symbols)}
    for close_line in (True, False):
        for part in (part for text in texts() for part in parts.of(text)):
            found = split(part, "<eos>", close_line=close_line, **options)
            encoded = known.encode_part(part, close_line=close_line)
            assert encoded.dtype == known.dtype
            assert encoded.tolist() == [ids.get(word, 1) for word in found]


def test_what_is_forgotten_is_what_stands_least_often():
    """Of each part in turn: as if each word had been looked up."""
    draw, limit = np.random.default_rng(3), 40
    counted = counting.Words(["<eos>"], limit=limit)
    expected, error = collections.Counter(), 0
    for _ in range(60):
        part = parts.Part(" ".join(f"w{i}" for i in draw.zipf(1.3, 25)).encode())
        expected.update(split(part, "<eos>"))
        if len(expected) > limit:
            least = sorted(expected.values())[len(expected) // 2]
            kept = {w: n for w, n in expected.items() if n > least or w == b"<eos>"}
            expected, error = collections.Counter(kept), error + least
        counted.add(part, "text")
        assert [*counted.counts.items()] == [*expected.items()]
    assert counted.error == error > 5


def test_a_word_that_is_refused_is_refused_again():
    known = WordVocabulary(["<eos>", "a", "b"], [1, 1, 1])
    for _ in range(2):
        with pytest.raises(UserError, match="3 words: 'c', 'long.*'d'$"):
            known.encode(f"a b c a {'long' * 9} c d")
        assert known.encode("a b\n").tolist() == [1, 2, 0]
