"""Vocabularies: order, both directions, what is refused, what is stored."""

import base64
import json

import counted
import numpy as np
import pytest
from tokenizer_files import hugging_face

from xlformer.data import parts, pieces, utf8, vocabularies, vocabulary
from xlformer.errors import UserError

LINES = b"b a <unk>\n a A c\n\nb a"


def test_bytes_are_ordered_by_frequency_then_appearance():
    found = counted.bytes([b"zza", b"ayyx"], every=False)
    assert [chr(s) for s in found.symbols] == ["z", "a", "y", "x"]
    assert found.counts_V.tolist() == [2, 2, 2, 1]
    assert found.encode(b"xyz").tolist() == [3, 2, 0]
    assert found.decode([3, 2, 0]) == b"xyz"
    assert found.unit == "bytes" and found.size == 4


def test_any_byte_can_be_encoded_when_all_are_kept():
    found = counted.bytes([b"banana"])
    everything = bytes(range(256))
    assert found.size == 256 and found.dtype == np.uint8
    assert found.decode(found.encode(everything)) == everything
    assert found.encode("n\u00e9").dtype == np.uint8
    assert found.decode(found.encode("n\u00e9")) == "n\u00e9".encode()


def test_newlines_can_be_dropped():
    found = counted.bytes([b"ab\nab\n\n"], newline="drop", every=False)
    assert found.size == 2
    assert found.decode(found.encode(b"a\nb")) == b"ab"


def test_chars_are_code_points():
    text = "na\u00efve \U0001f600\U0001f600 na\u00efve"
    found = counted.chars([text.encode(), "\u0416".encode()])
    assert found.symbols[:2] == ("n", "a")
    assert found.decode(found.encode(text)) == text
    assert found.encode(text.encode()).tolist() == found.encode(text).tolist()
    with pytest.raises(UserError, match=r"not in the vocabulary.*'q', '\U0001f601'"):
        found.encode("q\U0001f601q")


def test_first_appearance_breaks_ties_far_into_a_text():
    text = "a" * (3 << 20) + "zyx" + "a" * (1 << 20) + "w"
    assert "".join(counted.chars([text.encode()]).symbols) == "azyxw"


def test_every_line_of_words_ends_in_eos():
    found = counted.words([LINES])
    assert found.symbols == ("<eos>", "a", "b", "<unk>", "A", "c")
    assert found.encode(LINES).tolist() == [2, 1, 3, 0, 1, 4, 5, 0, 0, 2, 1, 0]
    assert found.encode("b a", close_line=False).tolist() == [2, 1]
    assert found.encode("b nothing", close_line=False).tolist() == [2, 3]
    assert found.decode([2, 1, 0, 1, 0, 0]) == "b a\na\n\n"
    assert found.encode(found.decode([2, 1, 0, 1, 0, 0])).tolist() == [2, 1, 0, 1, 0, 0]


def test_words_may_be_lower_cased_and_unknown_ones_refused():
    found = counted.words([b"N n M\n"], lower=True)
    assert found.symbols == ("<eos>", "n", "m")
    assert found.encode("M N\n").tolist() == [2, 1, 0]
    with pytest.raises(UserError, match="book.txt: not in the vocabulary .*'what'"):
        found.encode("n what", where="book.txt")


def test_blocks_of_lines_do_not_change_words(monkeypatch):
    whole = counted.words([LINES])
    monkeypatch.setattr(parts, "SIZE", 7)
    assert counted.words([LINES]).symbols == whole.symbols
    assert whole.encode(LINES).tolist() == [2, 1, 3, 0, 1, 4, 5, 0, 0, 2, 1, 0]


def test_wrong_utf8_is_found_by_file_and_offset(monkeypatch):
    monkeypatch.setattr(parts, "SIZE", 4)
    found = counted.words([b"ab cd\n"])
    with pytest.raises(UserError, match="f.txt: byte 0xff at offset 9 is not valid"):
        found.encode(b"ab\ncd\nab \xff", where="f.txt")
    with pytest.raises(UserError, match="f.txt: byte 0xc3 at offset 2 is not valid"):
        counted.chars([b"ab\xc3"], where="f.txt")


def test_dtype_is_the_smallest():
    sizes = (256, 257, 65536, 65537)
    found = [vocabulary.token_dtype(size).name for size in sizes]
    assert found == ["uint8", "uint16", "uint16", "int32"]


def test_ids_out_of_range_are_refused():
    found = counted.bytes([b"abc"], every=False)
    for ids, bad in (([0, 3], 3), ([-1], -1)):
        with pytest.raises(UserError, match=f"out of range: {bad} of 3"):
            found.decode(ids)


def examples():
    yield counted.bytes([b"abca"])
    yield counted.bytes([b"ab\n"], newline="drop", every=False)
    yield counted.chars(["\u00fc\U0001f600 u".encode()])
    yield counted.words([LINES], specials=("<eos>", "<unk>"))
    yield counted.words([b"a b _ C\n"], unit="chars", lower=True)


@pytest.mark.parametrize("one", list(examples()), ids=lambda v: v.kind)
def test_stored_and_loaded_is_the_same(one, tmp_path):
    path = tmp_path / "vocabulary.json"
    path.write_text(one.to_json())
    two = vocabularies.load(path)
    assert type(two) is type(one)
    assert (two.symbols, two.unit, two.options()) == (
        one.symbols,
        one.unit,
        one.options(),
    )
    np.testing.assert_array_equal(two.counts_V, one.counts_V)
    text = one.decode(np.arange(one.size))
    np.testing.assert_array_equal(two.encode(text), one.encode(text))


BAD = {
    "truncated": lambda f: json.dumps(f)[:-9],
    "empty": lambda f: "",
    "a list": lambda f: "[1]",
    "deep": lambda f: "[" * 100_000,
    "pickle": lambda f: "\x80\x04cposix\nsystem\n",
    "other format": lambda f: json.dumps(f | {"format": "x"}),
    "other kind": lambda f: json.dumps(f | {"kind": "__import__('os')"}),
    "kind of no string": lambda f: json.dumps(f | {"kind": ["words"]}),
    "unknown field": lambda f: json.dumps(f | {"class": "os.system"}),
    "no symbols": lambda f: json.dumps({k: f[k] for k in f if k != "symbols"}),
    "symbols a string": lambda f: json.dumps(f | {"symbols": "<eos>"}),
    "nested symbol": lambda f: json.dumps(f | {"symbols": [*f["symbols"][:-1], ["c"]]}),
    "number symbol": lambda f: json.dumps(f | {"symbols": [*f["symbols"][:-1], 1]}),
    "repeated": lambda f: json.dumps(f | {"symbols": [*f["symbols"][:-1], "a"]}),
    "two words": lambda f: json.dumps(f | {"symbols": [*f["symbols"][:-1], "a b"]}),
    "few counts": lambda f: json.dumps(f | {"counts": f["counts"][1:]}),
    "negative": lambda f: json.dumps(f | {"counts": [-1, *f["counts"][1:]]}),
    "huge": lambda f: json.dumps(f | {"counts": [1 << 80, *f["counts"][1:]]}),
    "fraction": lambda f: json.dumps(f | {"counts": [0.5, *f["counts"][1:]]}),
    "true": lambda f: json.dumps(f | {"counts": [True, *f["counts"][1:]]}),
    "no eos": lambda f: json.dumps(f | {"eos": "</s>"}),
    "eos a list": lambda f: json.dumps(f | {"eos": ["<eos>"]}),
    "lower a string": lambda f: json.dumps(f | {"lower": "false"}),
    "unit": lambda f: json.dumps(f | {"unit": "furlongs"}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_or_hostile_file_is_one_line(name, tmp_path):
    fields = json.loads(counted.words([LINES]).to_json())
    path = tmp_path / "vocabulary.json"
    path.write_text(BAD[name](fields), encoding="utf-8")
    with pytest.raises(UserError, match="vocabulary.json: not a stored vocabulary"):
        vocabularies.load(path)


@pytest.mark.parametrize(
    ("kind", "symbols"),
    [("bytes", [256]), ("bytes", ["a"]), ("chars", ["ab"]), ("chars", ["\ud800"])],
)
def test_symbols_must_be_of_their_kind(kind, symbols):
    fields = {"format": vocabulary.FORMAT, "kind": kind}
    text = json.dumps(fields | {"symbols": symbols, "counts": [1]})
    with pytest.raises(UserError, match="not a stored vocabulary"):
        vocabularies.from_json(text)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(UserError, match="cannot read the vocabulary"):
        vocabularies.load(tmp_path / "nothing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read the vocabulary"):
        vocabularies.load(tmp_path / "binary.json")


TEXT = "the cat sat on the mat\nthe dog sat on the cat\n\na cat and a dog\n" * 20


def sentencepiece_model(folder, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_prefix=str(folder / "model"),
        minloglevel=9,
        hard_vocab_limit=False,
        **{"vocab_size": 19, **options},
    )
    return folder / "model.model"


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    return sentencepiece_model(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="module")
def hugging_face_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers") / "tokenizer.json"
    return hugging_face(path, TEXT.splitlines(), 271)


@pytest.mark.parametrize("which", ["sentencepiece_file", "hugging_face_file"])
def test_tokenizers_keep_their_ids_and_are_stored(which, request):
    one = pieces.load_tokenizer(request.getfixturevalue(which))
    ids = one.encode(TEXT)
    assert one.unit == "pieces" and one.size in (19, 271)
    assert one.decode(ids) == TEXT and one.line_ends
    counted = one.with_counts(np.bincount(ids, minlength=one.size))
    two = vocabularies.from_json(counted.to_json())
    np.testing.assert_array_equal(two.encode(TEXT), ids)
    assert two.counts_V.sum() == len(ids)
    prompt = one.encode("the cat", close_line=False)
    np.testing.assert_array_equal(prompt, ids[: len(prompt)])
    with pytest.raises(UserError, match="byte 0xff at offset 3"):
        one.encode(b"abc\xff")


@pytest.mark.parametrize(
    ("options", "newline"),
    [
        ({"user_defined_symbols": ["\n"]}, "\n"),
        ({"byte_fallback": True, "vocab_size": 283}, "<0x0A>"),
    ],
    ids=["symbol", "byte"],
)
def test_a_model_without_eos_ends_lines_with_its_newline(options, newline, tmp_path):
    one = pieces.load_tokenizer(sentencepiece_model(tmp_path, eos_id=-1, **options))
    ids = one.encode(TEXT)
    assert one.decode(ids) == TEXT and one.line_ends
    assert ids.tolist().count(one.symbols.index(newline)) == TEXT.count("\n")
    counted = one.with_counts(np.bincount(ids, minlength=one.size))
    two = vocabularies.from_json(counted.to_json())
    np.testing.assert_array_equal(two.encode(TEXT), ids)
    for bad in (-1, one.size, True, "0"):
        text = json.dumps(json.loads(one.to_json()) | {"newline_id": bad})
        with pytest.raises(UserError, match="'newline_id' is not the id"):
            vocabularies.from_json(text)


def test_a_model_that_drops_line_ends_is_refused_but_a_stored_one_read(tmp_path):
    path = sentencepiece_model(tmp_path, eos_id=-1)
    with pytest.raises(UserError, match=r"neither </s> nor a piece .*eos_id"):
        pieces.load_tokenizer(path)
    model = base64.b64encode(path.read_bytes()).decode()
    symbols = pieces._SentencePiece(path.read_bytes()).symbols()
    stored = pieces.PieceVocabulary(symbols, [0] * len(symbols), model)
    stored = vocabularies.from_json(stored.to_json())  # of a run of 0.1.0
    with pytest.raises(ValueError, match="'newline_id' in a model that has </s>"):
        eos = sentencepiece_model(tmp_path).read_bytes()
        symbols = pieces._SentencePiece(eos).symbols()
        model = base64.b64encode(eos).decode()
        pieces.PieceVocabulary(symbols, [0] * len(symbols), model, 0)
    assert not stored.line_ends and "\n" not in stored.decode(stored.encode(TEXT))


@pytest.mark.parametrize("which", ["words", "no newline", "whole lines"])
def test_a_tokenizer_whose_line_ends_are_lost_is_known(which):
    tokenizers = pytest.importorskip("tokenizers")
    symbols = {"[UNK]": 0, "a": 1, " ": 2}
    model = tokenizers.models.WordLevel(symbols, unk_token="[UNK]")
    model = tokenizers.Tokenizer(model)
    if which == "words":
        model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    if which == "no newline":  # it is a symbol, but an unknown one
        pattern = tokenizers.Regex(".|\n")
        model.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    text = model.to_str().encode()
    found = pieces.PieceVocabulary(symbols, [0] * 3, base64.b64encode(text).decode())
    assert not found.line_ends
    if which == "no newline":
        symbols["\n"] = 3
        model.model = tokenizers.models.WordLevel(symbols, unk_token="[UNK]")
        text = base64.b64encode(model.to_str().encode()).decode()
        assert pieces.PieceVocabulary(symbols, [0] * 4, text).line_ends


@pytest.mark.parametrize("scheme", ["always", "never"])
def test_a_space_before_a_line_is_seen_from_what_the_tokenizer_does(scheme, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    known = {s: i for i, s in enumerate(["<unk>", "\u2581the", "the", "\u2581cat"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, "<unk>"))
    metaspace = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    model.pre_tokenizer = metaspace
    model.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    model.save(str(tmp_path / "tokenizer.json"))
    found = pieces.load_tokenizer(tmp_path / "tokenizer.json")
    assert found.joined is (scheme == "always")


def test_characters_that_leave_no_token_are_known(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"c": 0, "a": 1}, []))
    model.save(str(tmp_path / "bpe.json"))
    found = pieces.load_tokenizer(tmp_path / "bpe.json")
    characters = utf8.Characters()
    for text in (b"a ca\n", "\u00e9\u65e5a\U0001f600t\u00e9".encode()):
        characters.add(text)
    assert characters.found() == "\n act\u00e9\u65e5\U0001f600"
    assert found.dropped(characters.found()) == "t\u00e9\u65e5\U0001f600"
    assert found.encode(b"a cat\n").tolist() == [1, 0, 1]


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": 1}', b"\x00\x01nonsense" * 9])
def test_a_broken_tokenizer_is_one_line(data, tmp_path):
    pytest.importorskip("sentencepiece")
    pytest.importorskip("tokenizers")
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError, match=r"config\.data\.tokenizer: .*not a "):
        pieces.load_tokenizer(tmp_path / "file")
    with pytest.raises(UserError, match=r"config\.data\.tokenizer: "):
        pieces.load_tokenizer(tmp_path / "nothing")
