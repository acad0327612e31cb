"""Bytes and words that scored tokens stand for, against counts of the raw text."""

import counted
import numpy as np
import pytest
from tokenizer_files import hugging_face

from xlformer import config, prepare
from xlformer.data import pieces
from xlformer.data.vocabulary import WordVocabulary
from xlformer.scoring import units

TEXT = "the café  sat\non a mat\n\nnaïve 日本 cats\n"


def count(vocabulary, text, spans, *, lines, whole=None, documents=None):
    tokens = vocabulary.encode(text)
    raw = text.encode() if isinstance(text, str) else text
    words = len(raw.split()) + lines * raw.count(b"\n")
    whole = whole or units.Count(len(raw), words)
    spans = [(a, len(tokens) if b is None else b) for a, b in spans]
    return units.scored(
        vocabulary, tokens, spans, whole, lines=lines, documents=documents
    )


def test_bytes_and_characters_are_counted_one_by_one(monkeypatch):
    monkeypatch.setattr(units, "BLOCK", 5)  # words cross blocks
    raw = TEXT.encode()
    vocabulary = counted.bytes([raw])
    assert count(vocabulary, raw, [(1, None)], lines=False) == (len(raw) - 1, 8)
    # "he ca", then "at" of "sat" and the newline, then "on"
    at = raw.index(b"at\n")
    spans = [(1, 6), (at, at + 5)]
    assert count(vocabulary, raw, spans, lines=False) == (10, 2)
    vocabulary = counted.chars([raw])
    assert count(vocabulary, TEXT, [(1, None)], lines=False) == (len(raw) - 1, 8)
    start = TEXT.index("日本")
    assert count(vocabulary, TEXT, [(start, start + 3)], lines=False) == (7, 1)


def test_dropped_newlines_count_nowhere():
    raw = b"ab\ncd e\nf\n"
    vocabulary = counted.bytes([raw], newline="drop")
    # Of "abcd ef" all but the first is scored: of the words the raw text knows better.
    assert count(vocabulary, raw, [(1, None)], lines=False) == (6, 4 - 1)
    # That "cd" was a word of its own the tokens do not say.
    assert count(vocabulary, raw, [(1, 3)], lines=False) == (2, None)


def test_of_several_documents_any_line_may_have_been_closed():
    """Of "a b" and "c d", one of which has no newline: of a part the bytes are open."""
    vocabulary = counted.words([b"a b c d"])
    whole, two = units.Count(7, 4), np.array([0, 3])
    for documents, expected in ((None, 3), (two, None)):
        found = units.scored(
            vocabulary,
            vocabulary.encode("a b\nc d\n"),
            [(1, 3)],
            whole,
            lines=False,
            documents=documents,
        )
        assert found.bytes == expected


def test_words_spell_themselves_and_one_separator(monkeypatch):
    monkeypatch.setattr(units, "BLOCK", 3)
    text = "the cat sat\non a mat\n\nnaïve cats\n"
    vocabulary = counted.words([text.encode()])
    size, tokens = len(text.encode()), len(vocabulary.encode(text))
    found = count(vocabulary, text, [(1, None)], lines=True)
    assert found == (size - len("the"), tokens - 1)
    # " cat sat" and "\n", then "\n" of the empty line, then "naïve"
    assert count(vocabulary, text, [(1, 4)], lines=True) == (len(" cat sat\n"), 3)
    assert count(vocabulary, text, [(8, 10)], lines=True) == (
        len("\nnaïve".encode()),
        2,
    )
    # A last line without a newline: preparation closes it, with a byte that is none.
    text, words = text[:-1], tokens
    whole = units.Count(size - 1, words)
    found = count(vocabulary, text, [(10, None)], lines=True, whole=whole)
    assert found == (len(" cats"), 2)


def test_of_words_whose_bytes_are_lost_only_the_whole_is_known():
    text = "the cat  sat\n the dog \n"  # white space that no token has
    vocabulary = counted.words([b"the cat sat dog\n"])
    assert count(vocabulary, text, [(1, None)], lines=True) == (len(text) - 3, 6)
    assert count(vocabulary, text, [(1, 3)], lines=True) == (None, 2)
    known = WordVocabulary(["<eos>", "<unk>", "the"], [0] * 3)
    text = "the mouse the louse\n"  # as many bytes as "the <unk> the <unk>"
    assert count(known, text, [(1, None)], lines=True) == (len(text) - 3, 4)
    assert count(known, text, [(1, 2)], lines=True) == (None, 1)
    assert count(known, text[4:], [(1, None)], lines=True) == (None, 3)


def test_spaces_between_characters_are_not_the_texts_own():
    raw = b"t h e _ c a t\na _ b\n"  # as pennchar has it
    vocabulary = counted.words([raw], unit="chars")
    whole = units.Count(len(raw), 6)  # the cat <eos> a b <eos>
    spans = [(1, None)]
    found = count(vocabulary, raw, spans, lines=True, whole=whole)
    assert found == (len("he cat\na b\n"), 5)
    found = count(vocabulary, raw, [(3, 5)], lines=True, whole=whole)
    assert found == (len(" c"), 1)


def test_no_word_goes_on_from_one_document_into_the_next():
    raw = b"abcdef"
    vocabulary = counted.bytes([raw])
    whole, documents = units.Count(6, 2), np.array([0, 3])
    options = {"lines": False, "whole": whole, "documents": documents}
    assert count(vocabulary, raw, [(1, None)], **options) == (5, 1)
    assert count(vocabulary, raw, [(1, 3)], **options) == (2, 0)
    assert count(vocabulary, raw, [(3, 5)], **options) == (2, 1)


LINES = "the cat sat on a mat\nthe dog ran\n" * 7


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES.splitlines()),
        model_prefix=str(folder / "model"),
        vocab_size=17,
        minloglevel=9,
    )
    return folder / "model.model"


@pytest.fixture(scope="module")
def hugging_face_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers") / "tokenizer.json"
    return hugging_face(path, LINES.splitlines(), 271)


@pytest.mark.parametrize("which", ["sentencepiece_model", "hugging_face_model"])
def test_pieces_spell_the_text(which, request):
    vocabulary = pieces.load_tokenizer(request.getfixturevalue(which))
    raw, tokens = LINES.encode(), vocabulary.encode(LINES)
    first = len(units._spelling(vocabulary)(tokens[:1], None))
    # SentencePiece's first piece may be the space before a line, which is not there.
    words = len(LINES.split()) + LINES.count("\n") - (first > 0)
    found = count(vocabulary, LINES, [(1, None)], lines=True)
    assert found == (len(raw) - first, words)
    # Any cut: the parts add up.
    parts = [(1, 5), (5, 9), (9, 10), (10, 31), (31, None)]
    sums = [count(vocabulary, LINES, [part], lines=True) for part in parts]
    assert tuple(map(sum, zip(*sums, strict=True))) == found
    line = vocabulary.encode("the cat sat on a mat\n")
    spans = [(len(line), len(line) + len(vocabulary.encode("the dog ran\n")))]
    assert count(vocabulary, LINES, spans, lines=True) == (len("the dog ran\n"), 4)
    # What is not in the pieces: two spaces become one, or are two.
    odd = LINES.replace("a mat", "a  mat") + "ж\n"
    all_but_first = count(vocabulary, odd, [(1, None)], lines=True)
    assert all_but_first[0] == len(odd.encode()) - first
    line = vocabulary.encode("the cat sat on a  mat\n")
    part = count(vocabulary, odd, [(1, len(line))], lines=True)
    assert part[0] in (None, len("the cat sat on a  mat\n") - first)


@pytest.mark.parametrize("unit", ["bytes", "chars", "words"])
def test_a_prepared_text_is_counted_alike(unit, tmp_path):
    rng = np.random.default_rng(3)
    words = rng.choice(["be", "naïve", "or", "not", "it."], 499)
    text = "\n".join(" ".join(words[i : i + 7]) for i in range(0, 499, 7)) + "\n"
    (tmp_path / "book").write_text(text, encoding="utf-8")
    data = config.default_config().data
    data.update(corpus="text", path=f"{tmp_path}/book", unit=unit)
    found = prepare.prepare(data)
    lines = "<eos>" in found.card["words_are"]
    for split, tokens in found.tokens.items():
        card = found.card["splits"][split]
        whole = units.Count(card["bytes"], card["words"])
        spans = [(0, 9), (9, len(tokens))]
        each = [
            units.scored(found.vocabulary, tokens, [span], whole, lines=lines)
            for span in spans
        ]
        assert tuple(map(sum, zip(*each, strict=True))) == whole
