"""Documents in blocks: parts join to the text, files that change, seams of lines."""

import codecs
import os

import counted
import numpy as np
import pytest
from tokenizer_files import hugging_face

from xlformer.data import (
    counting,
    documents,
    encoding,
    local,
    parts,
    pieces,
    units,
    utf8,
)
from xlformer.errors import UserError

TEXT = (
    "na\u00efve cats\r\nsat on\rmats \u65e5\u672c\n\n" * 31
    + "\t"
    + "long" * 40
    + " end"
)
RAW = TEXT.encode()


@pytest.fixture(params=[3, 5, 17])
def small(request, monkeypatch):
    """Blocks and parts of a few bytes: every seam is somewhere in the text."""
    monkeypatch.setattr(documents, "BLOCK", request.param)
    monkeypatch.setattr(units, "BLOCK", request.param)
    monkeypatch.setattr(parts, "SIZE", request.param + 2)
    monkeypatch.setattr(parts, "LONGEST", 97)


def file_of(tmp_path, data):
    path = tmp_path / "book.txt"
    path.write_bytes(data)
    return path


def test_parts_join_to_the_text_and_cut_no_character(small, tmp_path):
    path = file_of(tmp_path, RAW)
    found = list(parts.of(local.open_text(str(path), "chars")))
    assert b"".join(part.data for part in found) == RAW
    assert [part.data.decode() for part in found]
    offsets = np.cumsum([0, *(len(part.data) for part in found)])[:-1]
    assert [part.offset for part in found] == offsets.tolist()
    assert [part.ends for part in found] == [False] * (len(found) - 1) + [True]
    for before, part in zip(found, found[1:], strict=False):
        assert part.in_line == (not before.data.endswith(b"\n"))
    # Only the word that is longer than any may be is cut.
    cut = [part.offset for part in found if part.in_word]
    start = RAW.index(b"longlong")
    assert cut and all(start < offset < start + 160 for offset in cut)


@pytest.mark.parametrize("unit", ["bytes", "chars", "words"])
def test_what_is_counted_and_encoded_does_not_depend_on_parts(unit, tmp_path):
    text = RAW.replace(b"long" * 40, b"long")
    path = file_of(tmp_path, text)

    def made():
        text = local.open_text(str(path), unit)
        count = getattr(counted, unit)
        vocabulary = count([text])
        ids = vocabulary.encode(text)
        return vocabulary.symbols, vocabulary.counts_V.tolist(), ids.tolist()

    whole = made()
    for size in (2, 5, 11):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents, "BLOCK", size)
            patch.setattr(parts, "SIZE", size)
            assert made() == whole


def test_counts_of_two_texts_add_up_in_their_order():
    one, two = b"z a a c", b"y c c b e"
    for make in (lambda: counting.Codes("chars"), lambda: counting.Words(["<eos>"])):
        joined, first, second = make(), make(), make()
        for counter, text in ((first, one), (second, two)):
            counter.add(parts.Part(text), "text")
            joined.follow(counter.found())
        both = make()
        both.add(parts.Part(one), "text")
        both.add(parts.Part(two), "text")
        if isinstance(both, counting.Words):
            assert list(joined.counts.items()) == list(both.counts.items())
            assert joined.total == both.total
        else:
            assert joined.ordered().tolist() == both.ordered().tolist()


def test_words_are_cut_at_all_white_space_of_unicode():
    """At what str.split() cuts, though it is bytes that are cut."""
    spaces = [chr(i) for i in range(0x110000) if chr(i).isspace()]
    # Neighbours of white space, or characters that end as some of it.
    others = [*"a\u00e9\u2019\u200b\u2080\u3001\u1681\u00ab", "\U0001f600"]
    draw = np.random.default_rng(4)
    for _ in range(300):
        few = [*draw.choice(spaces, 2), *others] if draw.integers(2) else others
        text = "".join(draw.choice([*few, " "], draw.integers(1, 9)))
        found = [word.decode() for word in utf8.plain_spaces(text.encode()).split()]
        assert found == text.split(), ascii(text)


def test_words_are_bounded_and_the_error_is_stated():
    draw = np.random.default_rng(3)
    common = [f"c{i}" for i in range(20)]
    rare = [f"r{i}" for i in range(5000)]
    words = [*common * 100, *rare]
    draw.shuffle(words)
    counted = counting.Words(["<eos>", "<unk>"], limit=200)
    for start in range(0, len(words), 50):
        counted.add(parts.Part(" ".join(words[start : start + 50]).encode()), "text")
    assert len(counted.counts) <= 200 and counted.total == len(words) + 140
    assert 0 < counted.error < 100
    for word in common:
        assert 100 - counted.error <= counted.counts[word.encode()] <= 100
    found = counting.word_vocabulary(counted, 30, 0, "words")
    assert set(common) <= set(found.symbols)
    # Whatever was forgotten is <unk>: nothing of the text is lost.
    assert found.counts_V.sum() == counted.total


@pytest.mark.parametrize("unit", ["chars", "words"])
def test_files_are_cut_as_one_text_without_marks(unit, small, tmp_path):
    """Neither a byte order mark nor the end of a file changes where units begin."""
    text = " ".join("abcdefg")
    for name in ("one", "two", "three"):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + text.encode())
    names = (f"{tmp_path}/{name}" for name in ("one", "two", "three"))
    found = local.read_files(";".join(names), unit)
    sizes = [sum(map(len, documents)) for documents in found.splits.values()]
    # 39 characters are cut at 35 and 37, 21 words at the last "e" and "f".
    assert sizes == ([35, 2, 2] if unit == "chars" else [34, 2, 3])


@pytest.mark.parametrize("size", [4, 7, 30])
def test_a_word_that_is_cut_counts_once(size, monkeypatch):
    monkeypatch.setattr(parts, "SIZE", size)
    monkeypatch.setattr(parts, "LONGEST", 23)
    text = b"a few\n" + b"long" * 20 + b" words\n\n" + b"x" * 60 + b"\tand so on"
    found = [
        encoding.words(part, spaced=False, lines=lines)
        for lines in (False, True)
        for part in parts.of(text)
    ]
    assert sum(found) == 2 * len(text.split()) + 4


def test_a_part_ends_before_a_space_rather_than_a_tab(monkeypatch):
    monkeypatch.setattr(parts, "SIZE", 8)
    found = [part.data for part in parts.of(b"ab cd\tefghij kl")]
    assert found == [b"ab", b" cd", b"\tefghij", b" kl"]


def test_a_text_with_wide_white_space_alone_is_cut_at_it(monkeypatch):
    text = "\u65e5\u672c\u3000\u56fd\u8a9e\u2003\u5927\u5b66\u0085" * 9
    whole = counted.words([text])
    monkeypatch.setattr(parts, "SIZE", 5)
    monkeypatch.setattr(parts, "LONGEST", 17)
    assert len(list(parts.of(text))) > 20
    found = counted.words([text])
    assert found.symbols == whole.symbols
    assert found.counts_V.tolist() == whole.counts_V.tolist() == [1, 9, 9, 9]


def test_a_lone_return_is_seen_across_blocks(small, tmp_path):
    path = file_of(tmp_path, RAW)
    expected = documents.LONE_RETURN.sub(b"\n", RAW)
    document = local.open_text(str(path), "words")
    assert document.read() == expected
    # A cut between a return and its newline is not the end of a line.
    for stop in (RAW.index(b"\r\n") + 1, RAW.index(b"\rmats") + 1):
        assert document.part(0, stop).read() == expected[:stop]
        assert document.part(stop, len(RAW)).read() == expected[stop:]


@pytest.mark.parametrize("unit", ["bytes", "chars", "words"])
def test_splits_are_cut_at_units_wherever_blocks_end(unit, small, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}").write_bytes(RAW[: 211 + 97 * i])
    whole = b"".join(RAW[: 211 + 97 * i] for i in range(3))
    found = local.read_files(f"{tmp_path}/*", unit)
    joined = [b"".join(d.read() for d in found.splits[s]) for s in found.splits]
    assert b"".join(joined).replace(b"\r", b"\n") == whole.replace(b"\r", b"\n")

    def length(data):
        if unit == "words":
            return len(data.split())
        return len(data.decode()) if unit == "chars" else len(data)

    # A word that goes over the end of a file is two.
    texts = [RAW[: 211 + 97 * i] for i in range(3)]
    total = sum(map(length, texts))
    assert length(joined[0]) + (unit == "words") * 2 >= total * 90 // 100
    assert abs(length(joined[0]) - total * 90 // 100) <= 2


@pytest.mark.parametrize("change", ["grows", "shrinks", "is replaced"])
def test_a_file_that_changes_while_it_is_read_is_refused(change, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 100)
    path = file_of(tmp_path, RAW)
    document = local.open_text(str(path), "bytes")
    assert document.read() == RAW
    blocks = document.blocks()
    next(blocks)
    if change == "grows":
        path.write_bytes(RAW + b"more")
    elif change == "shrinks":
        os.truncate(path, 150)
    else:
        path.write_bytes(RAW[::-1])
        os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=f"{path} has changed while it was read"):
        b"".join(blocks)


def test_a_wrong_byte_is_found_at_its_offset_in_any_block(small, tmp_path):
    data = RAW + b"\xe2\x82"
    path = file_of(tmp_path, data)
    with pytest.raises(UserError, match=f"byte 0xe2 at offset {len(RAW)} .*iconv -c"):
        local.open_text(str(path), "words")
    path.write_bytes(b"plain text " * 9 + b"\xff")
    with pytest.raises(UserError, match="byte 0xff at offset 99 .*iconv -f LATIN1"):
        local.open_text(str(path), "chars")


@pytest.mark.parametrize("which", ["sentencepiece", "tokenizers"])
def test_a_line_that_is_longer_than_a_part_has_the_same_pieces(
    which, tmp_path, monkeypatch
):
    line = "the cat sat on the mat and the dog sat on the cat " * 40
    if which == "tokenizers":
        path = hugging_face(tmp_path / "tokenizer.json", [line], 271)
    else:
        sentencepiece = pytest.importorskip("sentencepiece")
        path = tmp_path / "model.model"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line[:200]] * 3),
            model_prefix=str(tmp_path / "model"),
            vocab_size=19,
            minloglevel=9,
            hard_vocab_limit=False,
        )
    one = pieces.load_tokenizer(path)
    whole = one.encode(line.strip() + "\nthe end\n").tolist()
    monkeypatch.setattr(parts, "SIZE", 41)
    assert one.encode(line.strip() + "\nthe end\n").tolist() == whole
