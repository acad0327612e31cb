"""Pickles are read without being run, whichever Python wrote them."""

import collections
import os
import pickle
import sys
import tracemalloc
import types

import damaged_weights
import numpy as np
import pytest

from xlformer.convert import adopt, plain_pickle, plain_values, tensorflow_vocabulary
from xlformer.data.vocabulary import ByteVocabulary, CharVocabulary, WordVocabulary
from xlformer.errors import UserError

CACHES = damaged_weights.CACHES


@pytest.fixture
def program(monkeypatch):
    """Corpus and Vocab under the names that the original's pickles give them."""
    modules = types.ModuleType("data_utils"), types.ModuleType("vocabulary")
    for module, name in zip(modules, ("Corpus", "Vocab"), strict=True):
        made = type(name, (), {"__module__": module.__name__})
        setattr(module, name, made)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return modules[0].Corpus, modules[1].Vocab


def corpus(program, symbols, dataset, **fields):
    made, vocab = program[0](), program[1]()
    vocab.idx2sym = list(symbols)
    vocab.sym2idx = collections.OrderedDict((s, i) for i, s in enumerate(symbols))
    vocab.counter = collections.Counter(symbols)
    vars(vocab).update({"lower_case": False, **fields})
    made.dataset, made.vocab = dataset, vocab
    made.train = np.arange(3 * plain_pickle.LONGEST)
    return made


def written(tmp_path, content):
    path = tmp_path / "cache.pkl"
    path.write_bytes(content)
    return str(path)


def refused(tmp_path, content, said):
    path = written(tmp_path, content)
    with pytest.raises(UserError) as error:
        adopt.read_vocabulary(path)
    assert path in str(error.value) and said in str(error.value), error.value


# The original's own files -------------------------------------------------------------


@pytest.mark.parametrize("name", ["wt103", "enwik8"])
def test_the_ids_are_those_that_the_program_gave(name, program):
    """Its corpus is unpickled here, in the test, to have what it encoded."""
    folder = CACHES / name
    vocabulary = adopt.read_vocabulary(str(folder / "cache.pkl"))
    theirs = pickle.loads((folder / "cache.pkl").read_bytes())
    for split in ("train", "valid", "test"):
        text = (folder / f"{split}.txt").read_text()
        if name == "enwik8":
            text = bytes(int(number) for number in text.split())
        found = vocabulary.encode(text)
        np.testing.assert_array_equal(found, getattr(theirs, split))
    assert list(map(str, vocabulary.symbols)) == theirs.vocab.idx2sym
    counted = [theirs.vocab.counter[str(symbol)] for symbol in vocabulary.symbols]
    assert vocabulary.counts_V.tolist() == counted and max(counted) > 3


def test_lm1bs_words_are_those_of_its_file(program):
    vocabulary = adopt.read_vocabulary(str(CACHES / "lm1b" / "cache.pkl"))
    assert vocabulary.symbols == ("<S>", "<UNK>", "the", "cat", "sat")
    found = vocabulary.encode("the cat sat\nthe dog sat\n")
    assert found.tolist() == [0, 2, 3, 4, 0, 2, 1, 4, 0]
    # The program has <S> at both ends of a sentence; docs/weights.md says what to do.
    theirs = pickle.loads((CACHES / "lm1b" / "cache.pkl").read_bytes()).valid
    found = vocabulary.encode("the cat sat\n<S> the dog sat\n")
    np.testing.assert_array_equal(found, theirs)


@pytest.mark.parametrize("protocol", range(5))
def test_every_protocol_says_the_same(protocol, program, tmp_path):
    made = corpus(
        program, ["<eos>", "été", "x" * 300, "<unk>"], "wt103", lower_case=True
    )
    path = written(tmp_path, pickle.dumps(made, protocol))
    vocabulary = adopt.read_vocabulary(path)
    assert vocabulary.symbols == tuple(made.vocab.idx2sym)
    assert isinstance(vocabulary, WordVocabulary) and vocabulary.lower
    assert vocabulary.counts_V.tolist() == [1, 1, 1, 1]


def test_what_python_2_wrote(tmp_path):
    words = ["<eos>", "été", "a\xa0b", "\u2028", "<unk>"]
    symbols = [word.encode() for word in words] + [b"\xe9"]
    fields = {b"idx2sym": symbols, b"counter": dict.fromkeys(symbols[1:], 7)}
    content = damaged_weights.python_2(fields, b"wt103")
    vocabulary = adopt.read_vocabulary(written(tmp_path, content))
    # A byte string may hold white space of Unicode, or what is no UTF-8: no word of a
    # text is such a symbol, whose number stays.
    stand_ins = ("a\\xa0b", "\\u2028", "<unk>", "\\xe9")
    assert vocabulary.symbols == ("<eos>", "été", *stand_ins)
    assert vocabulary.encode("été a\xa0b").tolist() == [1, 4, 4, 0]
    assert vocabulary.counts_V.tolist() == [0, 7, 7, 7, 7, 7]


def test_characters_and_bytes(program, tmp_path):
    path = written(tmp_path, pickle.dumps(corpus(program, "e_ab", "text8"), 2))
    vocabulary = adopt.read_vocabulary(path)
    assert isinstance(vocabulary, CharVocabulary)
    assert vocabulary.symbols == ("e", " ", "a", "b")
    # Digits are characters, but enwik8's are bytes.
    for dataset, kind in (("text8", CharVocabulary), ("enwik8", ByteVocabulary)):
        path = written(tmp_path, pickle.dumps(corpus(program, "312", dataset), 2))
        assert isinstance(adopt.read_vocabulary(path), kind)


# Files of strangers -------------------------------------------------------------------


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_what_names_anything_else_is_refused_and_not_run(protocol, program, tmp_path):
    canary = tmp_path / "ran"
    made = corpus(program, ["<eos>"], "wt103")
    made.train = Touch(canary)
    refused(tmp_path, pickle.dumps(made, protocol), "it names 'posix.mkdir', and only ")
    assert not canary.exists() and "posix" not in str(tensorflow_vocabulary.ROLES)
    content = pickle.dumps(Touch(canary), protocol)
    pickle.loads(content)  # It would work.
    assert canary.exists()


def test_a_name_of_the_list_is_not_called_either(tmp_path):
    """Whatever stands for it has only the arguments that the program's files give."""
    for call in (
        b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.",
        b"ccollections\nCounter\n(K\x07tR.",
    ):
        refused(tmp_path, call, "")
    refused(tmp_path, b"cvocabulary\nVocab\n(K\x01tR.", "of what it does not take")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a pickle"),
        (b"\x80\x02", "it ends before its end"),
        (b"not a pickle at all", "not a pickle"),
        (b"\x80\x02K\x01.", "it holds neither a data_utils.Corpus nor a"),
        (b"\x80\x02.", "nothing to take"),
        (b"(0.", "nothing to take"),
        (b"e.", "no mark"),
        (b"h\x07.", "nothing was kept as number 7"),
        (b"\x8d" + b"\xff" * 8 + b".", "where it ends before"),
        (b"X\xff\xff\xff\xffa.", "where it ends before"),
        (b"\x8b\xff\xff\xff\x7f1.", "an integer of 2147483647 bytes"),
        (b"I" + b"9" * 5000 + b"\n.", "thousands of characters"),
        (b"Pid\n.", "opcode b'P'"),
        (b"\x82\x01.", "opcode"),  # Of the registry of extensions.
        (b"cvocabulary\nVocab\n)\x81.", "that has no attributes"),
        (b"cvocabulary\nVocab\n)\x81}b.", "no list idx2sym"),
        (b"X\x02\x00\x00\x00\xff\xfe.", "codec can't decode"),
    ],
)  # fmt: skip
def test_what_is_no_such_pickle_is_one_line(content, said, tmp_path):
    refused(tmp_path, content, said)


def test_two_orders_are_refused(program, tmp_path):
    made = corpus(program, ["<eos>", "a", "b"], "wt103")
    made.vocab.sym2idx["a"] = 2
    refused(tmp_path, pickle.dumps(made, 2), "another number for 'a' than 1")
    made.vocab.sym2idx.popitem()
    refused(tmp_path, pickle.dumps(made, 2), "3 symbols in idx2sym, 2 in sym2idx")


@pytest.mark.parametrize("name", damaged_weights.bombs(1))
def test_a_small_file_cannot_stand_for_a_large_one(name, tmp_path, monkeypatch):
    """tests/soak/weights.py has larger ones, and the limits as they are."""
    monkeypatch.setattr(plain_pickle, "MOST_MEMORY", plain_pickle.MOST_MEMORY >> 7)
    content = damaged_weights.bombs(30_000)[name]
    tracemalloc.start()
    try:
        refused(tmp_path, content, "")
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


def test_one_string_does_not_become_many(tmp_path, monkeypatch):
    """A small file may name one of its byte strings a million times."""
    monkeypatch.setattr(plain_values, "MOST_TEXT", 10_000)

    def named(x: bytes, *, count: int) -> bytes:
        return b"C" + bytes([len(x)]) + x + b"q\0" + b"h\0" * (count - 1)

    begin, end = b"cvocabulary\nVocab\n)\x81}(", b"ub."
    long, listed = named(b"x" * 200, count=100), b"X\7\0\0\0idx2sym]("
    said = "strings of more than 10000 characters"
    refused(tmp_path, begin + listed + long + b"e" + end, "no sym2idx")
    numbered = b"X\7\0\0\0sym2idx}"
    refused(tmp_path, begin + listed + long + b"e" + numbered + end, said)
    refused(tmp_path, begin + long.replace(b"h\0", b"Nh\0") + b"N" + end, said)


def test_what_is_remembered_is_charged_for(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_pickle, "MOST_MEMORY", 1000 * plain_pickle.MEMO)
    refused(tmp_path, b"N" + b"\x94" * 1000 + b".", "neither a")
    refused(tmp_path, b"N" + b"\x94" * 1001 + b".", "of what would be kept")
