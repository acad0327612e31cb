"""Tokenizers that are trained on a sample of train, and WikiText-103 in pieces."""

import numpy as np
import pytest

from xlformer import config
from xlformer.data import encoding, parts, recipes, trained
from xlformer.errors import UserError
from xlformer.prepare import prepare
from xlformer.scoring import units

pytest.importorskip("tokenizers")
pytest.importorskip("sentencepiece")
TEXT = " \n = Robert <unk> = \n \n He said , \u00c4rger @-@ free . \n" * 9
UNSEEN = "  two  spaces\ta tab and \u4e2d\u6587\n\nno end"


def one(name, text=TEXT):
    return trained.train(name, 1, lambda number: parts.Part(text.encode()))


@pytest.mark.parametrize("name", ["tokenizers:280", "sentencepiece:290"])
def test_pieces_keep_all_of_any_text(name):
    found, about = one(name)
    assert found.size == about["pieces"] <= int(name.split(":")[1])
    assert found.line_ends
    for text in (TEXT, UNSEEN):
        ids = found.encode(text, close_line=False)
        assert found.decode(ids) == text
        assert found.unk_id not in ids.tolist()
    assert one(name)[0].to_json() == found.to_json()
    assert about["tokenizer"] == name and about["trained_by"].startswith(name[:7])
    assert about["trained_on"].startswith(f"train: 36 lines, {len(TEXT.encode())} byte")


def test_a_long_line_is_not_left_out():
    """By default SentencePiece takes none that is longer than 4 KiB."""
    draw = np.random.default_rng(2)
    text = " ".join(f"\u4e2d{i}" for i in draw.integers(0, 3000, 12_000))
    found, about = one("sentencepiece:290", text + "\n")
    assert trained.OF_EACH > len(text.encode()) > 1 << 16
    assert about["trained_on"].startswith("train: 1 lines, ")
    assert "\u4e2d" in "".join(found.symbols)


def test_a_sample_is_said_part_by_part(monkeypatch):
    monkeypatch.setattr(trained, "PARTS", 3)
    monkeypatch.setattr(trained, "OF_EACH", 7)
    texts = [b"a b\ncd\ne", b"", b"", b"longer than it\n", b"", b"", b"x\ny"]
    asked = []

    def part(number):
        asked.append(number)
        return parts.Part(texts[number])

    sample = trained.Sample(range(0, 7, 3), part, 7)
    assert list(sample.lines()) == ["a b\n", "cd\n", "longer ", "x\n", "y"]
    assert asked == [0, 3, 6] and (sample.lines_read, sample.bytes) == (5, 17)
    monkeypatch.setattr(trained, "_sentencepiece", lambda lines, size: list(lines))
    with pytest.raises(UserError, match="not a SentencePiece model"):  # but a list
        trained.train("sentencepiece:9", 7, part)
    assert asked == [0, 3, 6] * 2


def test_what_cannot_be_trained_is_one_line():
    line = r"tokenizer=sentencepiece:7: its characters and bytes need 2\d\d pieces at"
    with pytest.raises(UserError, match=line):
        one("sentencepiece:7")
    with pytest.raises(UserError, match="tokenizers:255: its bytes are 256 pieces"):
        one("tokenizers:255")


@pytest.mark.parametrize("size", ["", "0", "-5", "abc", " 9", "99999999"])
def test_a_number_of_pieces_is_asked_for_before_a_file(size):
    data = config.default_config().data
    for library in ("sentencepiece", "tokenizers"):
        data.update(corpus="text", path="nothing", tokenizer=f"{library}:{size}")
        line = f"tokenizer={library}:{size}: expected a number of pieces from 1"
        with pytest.raises(UserError) as error:
            recipes.check(data)
        assert " ".join(line.split()) in str(error.value)
    data.tokenizer = "./sentencepiece:x"
    recipes.check(data)  # a file


def wikitext(folder, **fields):
    for split in ("train", "valid", "test"):
        (folder / f"wiki.{split}.tokens").write_text(TEXT, encoding="utf-8")
    loaded = config.load("sha_rnn_wt103_wordpiece:debug", [])
    loaded.data.update(manual_dir=str(folder), directory=str(folder / "out"), **fields)
    return loaded


def test_wikitext_by_pieces_counts_its_words(tmp_path):
    loaded = wikitext(tmp_path)
    assert loaded.data.tokenizer == "tokenizers:8000"
    found = prepare(loaded.data)
    about, tokens = found.card["splits"]["test"], found.tokens["test"][:]
    words = TEXT.replace("\n", " <eos> ").split()
    assert about["words"] == len(words) and about["bytes"] == len(TEXT.encode())
    assert found.vocabulary.decode(tokens) == TEXT
    counted = np.bincount(tokens, minlength=found.vocabulary.size)
    np.testing.assert_array_equal(found.vocabulary.counts_V, counted)
    # Perplexity per word divides by the words of the text, whatever the pieces are.
    whole, half = units.Count(about["bytes"], about["words"]), (1, len(tokens) // 2)
    got = units.scored(found.vocabulary, tokens, [half], whole, lines=True)
    spelled = found.vocabulary.decode(tokens[1 : half[1]]).encode()
    part = parts.Part(spelled, ends=False)
    assert got == (len(spelled), encoding.words(part, spaced=False, lines=True))
    assert "withdrawn" in found.card["protocol"]
    assert found.card["tokenizer"] == "tokenizers:8000"
    other = prepare(wikitext(tmp_path, tokenizer="tokenizers:260").data)
    assert other.directory != found.directory
    assert other.vocabulary.size == 260 < found.vocabulary.size
    # The text is read once, for both.
    assert len(list((tmp_path / "out" / "tfds").iterdir())) == 1
