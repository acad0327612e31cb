"""Texts and their parts as tokens, with every kind of vocabulary."""

import counted
import numpy as np
import pytest
from harness_runs import CHARS, LINE, WORDS
from tokenizer_files import hugging_face

from xlformer.data import pieces
from xlformer.data.vocabulary import ByteVocabulary, CharVocabulary, WordVocabulary
from xlformer.errors import UserError
from xlformer.harness.texts import Texts

CUTS = [0, 3, 7, 11, 14, 21, len(LINE), len(LINE) + 3]  # before spaces and behind lines


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return pieces.load_tokenizer(hugging_face(path, [LINE] * 9, 290))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A model of unigrams with </s>, which ends lines."""
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("tokenizer") / "pieces"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([LINE.strip()] * 9),
        model_prefix=str(path),
        vocab_size=34,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return pieces.load_tokenizer(f"{path}.model")


@pytest.fixture(params=["bytes", "chars", "words", "byte_level", "sentences"])
def vocabulary(request):
    found = {"bytes": counted.bytes([LINE.encode()]), "chars": CHARS, "words": WORDS}
    return found.get(request.param) or request.getfixturevalue(request.param)


def test_parts_are_the_whole_and_follow_a_line_end(vocabulary):
    texts = Texts(vocabulary)
    (begin,) = texts.prefix
    assert vocabulary.decode([begin]) in ("\n", b"\n")
    text = LINE + "the cat"
    whole = texts.pair("", text, "")
    assert whole.first == 1
    expected = [begin, *vocabulary.encode(text, close_line=False)]
    assert whole.ids_N.tolist() == expected
    first = 1
    for a, b in zip(CUTS, CUTS[1:], strict=False):
        part = texts.pair(text[:a], text[a:b], "")
        assert part.first == first
        first = len(part.ids_N)
        assert part.ids_N.tolist() == expected[:first]
    bare = Texts(vocabulary, prefix=False).pair(text[:11], text[11:14], "")
    assert (
        bare.ids_N.tolist() == texts.pair(text[:11], text[11:14], "").ids_N[1:].tolist()
    )


def test_a_space_belongs_to_whoever_has_it(byte_level):
    """Tokens decide: a character is its own, and a piece has the space before it."""
    for vocabulary, sizes in ((CHARS, (3, 4)), (byte_level, (1, 1))):
        texts = Texts(vocabulary)
        for (context, rest), size in zip(
            (("the ", "cat"), ("the", " cat")), sizes, strict=True
        ):
            part = texts.pair(context, rest, "")
            assert len(part.ids_N) - part.first == size


def test_a_text_that_begins_by_itself_begins_once():
    options = {"eos": "<S>", "begins": True}
    texts = Texts(WordVocabulary(["<S>", "a", "b"], [0] * 3, **options))
    assert texts.document("a b\n", "").ids_N.tolist() == [0, 1, 2, 0]
    assert texts.pair("a", " b", "")[0].tolist() == [0, 1, 2]
    assert texts.pair("a", " b", "").first == 2
    assert texts.prompt("", "").tolist() == [0]
    bare = Texts(WordVocabulary(["<S>", "a", "b"], [0] * 3, **options), prefix=False)
    assert bare.document("a", "").ids_N.tolist() == [0, 1, 0]


def test_without_line_ends_a_space_and_without_that_nothing_comes_first():
    spaced = CharVocabulary([" ", "a"], [0] * 2)
    assert Texts(spaced).prefix.tolist() == [0]
    dropped = ByteVocabulary([10, 97, 32], [0] * 3, newline="drop")
    assert Texts(dropped).prefix.tolist() == [2]
    texts = Texts(CharVocabulary(["a"], [0]))
    assert texts.prefix.size == 0
    assert texts.document("aaa", "").first == 1
    with pytest.raises(UserError, match="^here: 'a' has nothing before it"):
        texts.pair("", "a", "here")
    assert texts.pair("a", "a", "").first == 1
    for empty in ("", " "):
        assert len(Texts(spaced).pair("", empty, "").ids_N) == 1 + len(empty)


def test_a_continuation_of_which_nothing_is_left_is_said(byte_level, monkeypatch):
    texts = Texts(byte_level)
    monkeypatch.setattr(texts, "encode", lambda *_, **__: np.array([5]))
    with pytest.raises(UserError, match="^here: nothing of 'x' is left in the tokens"):
        texts.pair("a", "x", "here")
    assert texts.pair("a", " ", "here").first == len(texts.pair("a", " ", "").ids_N)
