"""Preparation: your own text, the card, what is refused."""

import hashlib
import json
import os
import pathlib
import sys

import numpy as np
import pytest
from tokenizer_files import hugging_face

from xlformer import config, prepare
from xlformer.data import documents, local, parts, pieces, preparing, recipes, utf8
from xlformer.errors import UserError


def data_config(**fields):
    data = config.default_config().data
    data.update(corpus="text", **fields)
    return data


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def book(tmp_path):
    words = np.random.default_rng(3).choice(["be", "na\u00efve", "or", "not"], 499)
    lines = (" ".join(words[i : i + 7]) for i in range(0, 499, 7))
    path = tmp_path / "book.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def joined(found):
    return [found.vocabulary.decode(found.tokens[split]) for split in found.tokens]


@pytest.mark.parametrize("unit", ["bytes", "chars"])
def test_own_text_is_split_90_5_5_by_units(unit, book, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 7)  # words cross blocks
    monkeypatch.setattr(parts, "SIZE", 5)
    found = prepare.prepare(data_config(path=str(book), unit=unit))
    raw = book.read_bytes()
    text = raw if unit == "bytes" else raw.decode()
    n = len(text)
    cuts = (0, n * 90 // 100, n * 95 // 100, n)
    expected = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    assert joined(found) == expected
    assert found.documents == {"train": None, "validation": None, "test": None}
    assert found.vocabulary.size == (256 if unit == "bytes" else len(set(text)))
    assert found.card["payload_sha256"] == sha256(raw)
    words = [found.card["splits"][s]["words"] for s in found.tokens]
    assert words == [len(piece.split()) for piece in expected]
    sizes = [found.card["splits"][s]["bytes"] for s in found.tokens]
    assert sizes == [len(utf8.as_bytes(piece)) for piece in expected]
    for split in found.tokens:
        file = found.directory / f"{split}.npy"
        assert found.card["splits"][split]["sha256"] == sha256(file.read_bytes())
        assert np.load(file).tolist() == found.tokens[split][:].tolist()


def test_words_are_split_by_words_and_counted_on_train(book, tmp_path):
    text = book.read_text(encoding="utf-8") + "never seen\n"
    book.write_text(text, encoding="utf-8")
    found = prepare.prepare(data_config(path=str(book), unit="words"))
    symbols = found.vocabulary.symbols
    assert symbols[:2] == ("<eos>", "<unk>") and "never" not in symbols
    words = [
        sum(w != "<eos>" for w in map(symbols.__getitem__, ids))
        for ids in found.tokens.values()
    ]
    assert words == [450, 25, 26]  # of 501: cut at 450.9 and 475.95
    assert found.vocabulary.decode(found.tokens["test"]).endswith("<unk> <unk>\n")
    counts = np.bincount(found.tokens["train"], minlength=found.vocabulary.size)
    np.testing.assert_array_equal(found.vocabulary.counts_V, counts)


def test_rare_words_train_unk_and_the_card_says_so(tmp_path):
    # train: a 6 times, b 5, c 3, d 2, e and <unk> once; validation: f; test: a
    words = "a b a b a b a b a b c c c d d e <unk> a f a".split()
    (tmp_path / "book.txt").write_text("\n".join(words) + "\n")
    options = data_config(path=f"{tmp_path}/book.txt", unit="words")
    found = prepare.prepare(options)
    assert found.vocabulary.symbols == ("<eos>", "<unk>", "a", "b", "c", "d")
    assert found.vocabulary.counts_V.tolist() == [18, 2, 6, 5, 3, 2]
    ids = found.tokens["train"]
    assert np.bincount(ids).tolist() == found.vocabulary.counts_V.tolist()
    assert (found.card["min_count"], found.card["max_vocab"]) == (2, 0)
    shares = [about["unknown_share"] for about in found.card["splits"].values()]
    assert shares == [round(2 / 36, 6), 0.5, 0.0]
    options.update(min_count=1, max_vocab=6)  # no room for e
    bounded = prepare.prepare(options)
    assert bounded.directory != found.directory
    assert bounded.vocabulary.symbols == ("<eos>", "<unk>", "a", "b", "c", "d")
    options.update(max_vocab=7)
    bounded = prepare.prepare(options).vocabulary
    assert (bounded.symbols[-1], bounded.counts_V[1]) == ("e", 1)


GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "run-0.1.0" / "text.txt"
NAMES = {  # of the folders that 0.1.0 made of this text
    "text-chars-56d96efaf94d260b": {"unit": "chars"},
    "text-bytes-8841ba68e4f84fd2": {"unit": "bytes"},
    "text-bytes-c0de81edb13912b1": {"documents": True},
    "text-words-11978caf250809d0": {"unit": "words", "min_count": 1},
}


def test_what_0_1_0_prepared_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "complete", lambda folder, build: folder)
    monkeypatch.setattr(preparing, "load", lambda folder: folder.name)
    for name, fields in NAMES.items():
        assert prepare.prepare(data_config(path=str(GOLDEN), **fields)) == name
    data = config.default_config().data
    data.update(corpus="enwik8", min_count=1)  # as it is elsewhere anyway
    assert prepare.prepare(data) == "enwik8-bytes-7bae8f9bc29a6ad3"


@pytest.mark.parametrize("unit", ["bytes", "words"])
def test_every_file_is_a_document(unit, tmp_path):
    texts = [f"file {i} " + "x y " * (11 + i) for i in range(23)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02}.txt").write_text(text)
    (tmp_path / "23.txt").write_text("")  # no document
    path = f"{tmp_path}/0*.txt; {tmp_path}/*.txt"
    options = data_config(path=path, unit=unit, documents=True)
    options.min_count = int(unit == "words")  # Some stand once.
    found = prepare.prepare(options)
    starts = found.documents["train"]
    assert starts.dtype == np.int64 and starts[0] == 0
    ends = [*starts[1:], len(found.tokens["train"])]
    pieces_ = [
        found.vocabulary.decode(found.tokens["train"][a:b])
        for a, b in zip(starts, ends, strict=True)
    ]
    if unit == "bytes":
        assert [p.decode() for p in pieces_[:-1]] == texts[: len(pieces_) - 1]
        assert texts[len(pieces_) - 1].startswith(pieces_[-1].decode())
        whole = b"".join(joined(found)).decode()
        assert whole == "".join(texts)
    else:
        assert [p for p in pieces_[:-1]] == [
            t.strip() + "\n" for t in texts[: len(pieces_) - 1]
        ]
    assert found.documents["test"][0] == 0
    found = prepare.prepare(data_config(path=path, unit=unit))
    assert found.documents["train"] is None


def test_a_tokenizer_is_used_and_kept(book, tmp_path):
    hugging_face(tmp_path / "tokenizer.json", [book.read_text(encoding="utf-8")], 263)
    options = data_config(path=str(book), tokenizer=str(tmp_path / "tokenizer.json"))
    found = prepare.prepare(options)
    assert isinstance(found.vocabulary, pieces.PieceVocabulary)
    assert found.tokens["train"].dtype == np.uint16
    assert "".join(joined(found)) == book.read_text(encoding="utf-8")
    counts = np.bincount(found.tokens["train"], minlength=263)
    np.testing.assert_array_equal(found.vocabulary.counts_V, counts)


def test_a_tokenizer_that_loses_line_ends_is_said_and_counts_none(book, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    symbols = {"[UNK]": 0, "be": 1, "or": 2, "not": 3}
    model = tokenizers.models.WordLevel(symbols, unk_token="[UNK]")
    model = tokenizers.Tokenizer(model)
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    model.save(str(book.parent / "tokenizer.json"))
    tokenizer = str(book.parent / "tokenizer.json")
    options = data_config(path=str(book), tokenizer=tokenizer)
    assert recipes.recipe(options).key()["line_ends"] is False  # not what 0.1.0 made
    found = prepare.prepare(options)
    assert "config.data.tokenizer does not keep line ends" in capsys.readouterr().err
    sizes = [(s["tokens"], s["words"]) for s in found.card["splits"].values()]
    assert sum(tokens for tokens, _ in sizes) == sum(words for _, words in sizes) == 499
    assert found.card["words_are"] == "between white space"
    unknown = [s["unknown_share"] * s["tokens"] for s in found.card["splits"].values()]
    count = book.read_text(encoding="utf-8").split().count("na\u00efve")
    assert sum(unknown) == pytest.approx(count, abs=2.01)  # two cuts go through words


def test_the_standard_library_is_there_without_a_network():
    data = config.default_config().data
    found = prepare.prepare(data)
    text = local.read_stdlib()
    for split, (document,) in text.splits.items():
        assert found.vocabulary.decode(found.tokens[split]) == document.read()
    assert found.card["python"] == sys.version.split()[0]
    assert len(found.card["payload_sha256"]) == 64
    again = prepare.load(found.directory)
    assert again.card == found.card and again.vocabulary.size == 256


def test_what_is_prepared_is_found_again_until_the_text_changes(
    book, tmp_path, monkeypatch
):
    # A directory of its own: another test may have prepared the same book.
    options = data_config(path=str(book), directory=str(tmp_path / "prepared"))
    assert not preparing.is_prepared(options)
    one = prepare.prepare(options)
    assert preparing.is_prepared(options)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_build", "never".index)  # would raise
        assert prepare.prepare(options).directory == one.directory
    book.write_bytes(book.read_bytes()[1:])
    assert not preparing.is_prepared(options)
    assert prepare.prepare(options).directory != one.directory
    options.unit = "chars"
    assert prepare.prepare(options).directory != one.directory


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "needs config.data.path"),
        ({"path": "{tmp}/nothing.txt"}, "no such file: .*nothing.txt"),
        ({"path": "{tmp}/*.nothing"}, r"no such file: .*\*.nothing"),
        ({"path": "{tmp}"}, "is a directory"),
        ({"path": " ; "}, "needs config.data.path"),
        ({"path": "{tmp}/empty"}, r"\(.*/empty\): the text is empty$"),
        ({"path": "{tmp}/short"}, "short.* 10 bytes are too few: .* need 11 or more"),
        ({"path": "{tmp}/blank", "unit": "words"}, "blank.*: 0 words are too few"),
        ({"path": "{tmp}/once", "unit": "words"}, "min_count=2 leaves .* all 18 of"),
        ({"path": "{tmp}/once", "min_count": 3}, "min_count=3 is for .* unit bytes"),
        ({"corpus": "penn", "max_vocab": 99}, "max_vocab=99 is for .* is penn$"),
        ({"path": "{tmp}/bad", "unit": "chars"}, "/bad: byte 0xff at offset 60 is not"),
        ({"path": "{tmp}/bad", "unit": "words"}, "/bad: byte 0xff at offset 60 is not"),
        ({"path": "{tmp}/bad", "unit": "byte"}, "unit='byte' is none of bytes, chars"),
        ({"path": "{tmp}/bad", "newline": "drop"}, "newline=drop is for"),
        ({"path": "{tmp}/bad", "newline": "no"}, "newline='no' is none of keep, drop"),
        (
            {"path": "{tmp}/bad", "tokenizer": "{tmp}/no"},
            "data.tokenizer: .*/no",
        ),
        ({"corpus": "stdlib", "path": "{tmp}/bad"}, "need config.data.corpus=text"),
        ({"corpus": "stdlib", "documents": True}, "need config.data.corpus=text"),
        ({"corpus": "stdlib", "unit": "words"}, "stdlib has bytes"),
    ],
)
def test_wrong_options_are_one_line(fields, message, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"abcdefghij")
    (tmp_path / "once").write_text(" ".join(f"w{i}" for i in range(20)))
    (tmp_path / "blank").write_bytes(b" \n" * 40)
    (tmp_path / "bad").write_bytes(b"good text\n" * 6 + b"\xff" + b" text" * 40)
    fields = {
        key: value.replace("{tmp}", str(tmp_path)) if type(value) is str else value
        for key, value in fields.items()
    }
    data = config.default_config().data
    data.update({"corpus": "text"} | fields)
    with pytest.raises(UserError, match=message) as caught:
        prepare.prepare(data, directory=tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_text_to_score_is_encoded(book, tmp_path):
    found = prepare.prepare(data_config(path=str(book), unit="chars"))
    path = tmp_path / "other.txt"
    path.write_text("not or be\n")
    ids = prepare.encode_file(found.vocabulary, path)
    assert found.vocabulary.decode(ids) == "not or be\n"
    path.write_text("What?")
    with pytest.raises(UserError, match=f"{path}: not in the vocabulary.*'W', 'h'"):
        prepare.encode_file(found.vocabulary, path)
    path.write_bytes(b"not \xe9")
    with pytest.raises(UserError, match=f"{path}: byte 0xe9 at offset 4"):
        prepare.encode_file(found.vocabulary, path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=f"{path}: the text is empty"):
        prepare.encode_file(found.vocabulary, path)
    with pytest.raises(UserError, match="cannot read the text"):
        prepare.encode_file(found.vocabulary, tmp_path / "nothing")


CONFIG = """
from xlformer import config
def get_config():
    return config.default_config()
"""


def test_the_command_prints_the_card_and_refuses_in_one_line(book, tmp_path, capsys):
    (tmp_path / "own.py").write_text(CONFIG)
    flags = [f"--config={tmp_path}/own.py", "--config.data.corpus=text"]
    flags.append(f"--directory={tmp_path}/out")
    assert prepare.main([*flags, f"--config.data.path={book}"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[: out.index("\n}\n") + 2])["corpus"] == "text"
    folder = pathlib.Path(out.split("directory ")[1].split("\n")[0])
    assert folder.parent == tmp_path / "out" and prepare.load(folder)
    assert prepare.main([*flags, "--config.data.path=/nowhere"]) == 2
    error = capsys.readouterr().err
    assert error == "error: config.data.path: no such file: /nowhere\n"


def test_the_directory_is_the_flags_or_the_environments(book, tmp_path, monkeypatch):
    options = data_config(path=str(book))
    monkeypatch.setenv("XLFORMER_DATA", str(tmp_path / "environment"))
    assert prepare.prepare(options).directory.parent == tmp_path / "environment"
    options.directory = str(tmp_path / "config")
    assert prepare.prepare(options).directory.parent == tmp_path / "config"
    found = prepare.prepare(options, directory=tmp_path / "argument")
    assert found.directory.parent == tmp_path / "argument"
    assert os.path.isabs(found.directory)
