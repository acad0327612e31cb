"""Corpora of many documents: books, images and proteins, each read one by one."""

import dataclasses
import gzip
import itertools
import sys

import numpy as np
import pytest
import samples

from xlformer import config
from xlformer.data import encoding, images, parts, pg19, proteins, recipes
from xlformer.data.archives import Origin
from xlformer.data.documents import Source
from xlformer.data.stream import Stream
from xlformer.errors import UserError
from xlformer.prepare import prepare

SPLITS = ("train", "validation", "test")


def origin(corpus, folder):
    return Origin(corpus.name, corpus.archives, None, str(folder))


def texts(text):
    return {split: [d.read() for d in text.splits[split]] for split in SPLITS}


def data_config(corpus, folder, **fields):
    data = config.default_config().data
    data.update(corpus=corpus, manual_dir=str(folder), **fields)
    return data


# Proteins -----------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_fasta_file_is_split_by_its_sequences(packed, tmp_path):
    sequences = samples.proteins()
    sequences += [sequences[7], sequences[7].lower()]
    data = samples.fasta(sequences).replace(b"\n", b"\r\n")
    path = tmp_path / f"own.fasta{'.gz' * packed}"
    path.write_bytes(gzip.compress(data) if packed else data)
    text = proteins.read(origin(proteins.CORPUS, tmp_path))
    lines = {s: found[0].decode().splitlines() for s, found in texts(text).items()}
    assert sorted(itertools.chain(*lines.values())) == sorted(
        x.upper() for x in sequences
    )
    # A tenth each, and what is the same is in one split.
    assert {s: len(set(found)) for s, found in lines.items()} == dict(
        train=32, validation=4, test=4
    )
    assert not set(lines["train"]) & set(lines["validation"] + lines["test"])
    assert text.facts["proteins"] == {s: len(found) for s, found in lines.items()}
    assert text.facts["longest"] == {s: max(map(len, x)) for s, x in lines.items()}
    for (document,) in text.splits.values():
        assert len(document) == len(document.read())
        assert document.part(7, 90).read() == document.read()[7:90]


def test_of_many_proteins_the_shares_are_next_to_the_papers(monkeypatch, tmp_path):
    monkeypatch.setattr(proteins, "FEW", 10)
    # Every sequence of three residues, and some of four.
    three = map("".join, itertools.product(samples.RESIDUES, repeat=3))
    data = "".join(f">p\n{x}\n>q\n{x}A\n" for x in three).encode()
    (tmp_path / "all.fasta").write_bytes(data)
    text = proteins.read(origin(proteins.CORPUS, tmp_path))
    found = text.facts["proteins"]
    assert sum(found.values()) == 2 * 25**3
    assert 14 < found["validation"] < 52 and 250 < found["test"] < 380
    assert "0.1%" in text.facts["split_by"] and "1.0%" in text.facts["split_by"]
    assert len(text.splits["test"][0].read()) == text.splits["test"][0].source.size


def test_three_files_are_the_splits(tmp_path):
    sequences = samples.proteins(3)
    for name, x in zip(("train", "valid", "test"), sequences, strict=True):
        (tmp_path / f"{name}.fasta").write_bytes(samples.fasta([x]))
    found = texts(proteins.read(origin(proteins.CORPUS, tmp_path)))
    assert found == {
        s: [f"{x}\n".encode()] for s, x in zip(SPLITS, sequences, strict=True)
    }
    (tmp_path / "valid.fasta").unlink()
    with pytest.raises(UserError, match=r"but no valid\.fasta"):
        proteins.read(origin(proteins.CORPUS, tmp_path))


ENTRY = b">tr|A1|A1_X One\n"
WRONG_FASTA = {
    "no header": (b"MKV\n" + ENTRY + b"MK\n", "it begins with 'MKV', and not with"),
    "letter": (ENTRY + b"MKJV\n", r">tr\|A1\|A1_X One has 'J': residues are ACDE"),
    "gap": (ENTRY + b"MK-V*\n", r"has '\*', '-'"),
    "bare": (ENTRY + b"\n>tr|A2|A2_X\nMK\n", r">tr\|A1\|A1_X One has no residues"),
    "empty": (b"", "the file is empty"),
    "few": (ENTRY + b"MK\n" + ENTRY + b"MK\n", "1 different proteins are too few"),
    "cut": (gzip.compress(samples.fasta(samples.proteins()))[:-9], "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG_FASTA)
def test_what_is_no_fasta_file_of_proteins_is_one_line(name, tmp_path):
    data, message = WRONG_FASTA[name]
    (tmp_path / "x.fasta").write_bytes(data)
    with pytest.raises(UserError, match=message):
        proteins.read(origin(proteins.CORPUS, tmp_path))


def test_a_folder_has_one_fasta_file(tmp_path):
    with pytest.raises(UserError, match="found none"):
        proteins.read(origin(proteins.CORPUS, tmp_path))
    for name in "ab":
        (tmp_path / f"{name}.fasta").write_bytes(ENTRY)
    with pytest.raises(UserError, match=r"found a\.fasta, b\.fasta"):
        proteins.read(origin(proteins.CORPUS, tmp_path))


class Endless(Source):
    """`size` bytes of one entry after the other, none of which is kept."""

    def __init__(self, entry, size):
        super().__init__("endless", b"")
        self.entry, self.size = entry, size

    def pieces(self, start, stop):
        length = len(self.entry)
        block = self.entry * (4 * 2**20 // length // 4)
        while start < stop:
            found = block[start % length :][: stop - start]
            yield found
            start += len(found)


def test_proteins_are_not_held_in_memory():
    entry = samples.fasta(["".join(samples.RESIDUES * 20)])
    size = len(entry) * 100_000  # 58 MB
    fasta = proteins.Fasta(Endless(entry, size))
    lines = proteins.Lines(fasta, 100_000 * 501, lambda residues: True)
    largest = total = 0
    for piece in lines.pieces(0, lines.size):
        largest, total = max(largest, len(piece)), total + len(piece)
    assert total == lines.size and largest < 2**21


@pytest.mark.parametrize("cuts", [(), (1,), (4,), (5,), (9,), (3, 4, 5), (8, 10)])
def test_lines_are_documents_wherever_parts_are_cut(cuts):
    data = b"MKV\nA\nWWWW\nCC"
    bounds, found, tokens = [0, *cuts, len(data)], [], 0
    for low, high in zip(bounds, bounds[1:], strict=False):
        in_line = low > 0 and data[low - 1 : low] != b"\n"
        part = parts.Part(data[low:high], low, in_line)
        found += (tokens + encoding.line_starts(part)).tolist()
        tokens += len(part.data.replace(b"\n", b""))
    assert found == [0, 3, 4, 8]


def test_proteins_are_residues_in_a_fixed_order(tmp_path):
    samples.write_proteins(tmp_path / "own")
    data = data_config("trembl", tmp_path / "own", documents=True)
    found = prepare(data, directory=tmp_path)
    assert bytes(found.vocabulary.symbols).decode() == samples.RESIDUES
    text = texts(proteins.read(origin(proteins.CORPUS, tmp_path / "own")))
    for split in SPLITS:
        lines = text[split][0].decode().splitlines()
        ids = [samples.RESIDUES.index(x) for x in "".join(lines)]
        np.testing.assert_array_equal(found.tokens[split][:], ids)
        starts = np.cumsum([0, *map(len, lines)])[:-1]
        np.testing.assert_array_equal(found.documents[split], starts)
    assert found.vocabulary.counts_V.sum() == len(found.tokens["train"])
    assert found.card["splits"]["train"]["words"] == 32  # proteins
    assert "Pfam" in found.card["protocol"] and found.card["unpinned"] == ["few.fasta"]


# Images -------------------------------------------------------------------------------


def unpinned(monkeypatch):
    for split, (archive, folder) in images.ARCHIVES.items():
        free = dataclasses.replace(archive, sha256="")
        monkeypatch.setitem(images.ARCHIVES, split, (free, folder))


def write_archives(folder, files):
    for name in ("train", "valid"):
        (folder / f"{name}_64x64.tar").write_bytes(samples.tar(files))


def test_images_come_in_the_order_of_the_archive(monkeypatch, tmp_path):
    arrays = samples.pixels(4)
    # An image's place in the archive counts, and not its name.
    names = [f"train_64x64/{i}.png" for i in (3, 1, 2, 0)]
    files = dict(zip(names, map(samples.png, arrays), strict=True))
    write_archives(tmp_path, files)
    with pytest.raises(UserError, match=r"wrong checksum of .*train_64x64\.tar"):
        images.read(origin(images.CORPUS, tmp_path))
    unpinned(monkeypatch)
    text = images.read(origin(images.CORPUS, tmp_path))
    expected = [x.tobytes() for x in arrays]
    assert texts(text) == dict.fromkeys(SPLITS, expected)
    # Rows from the top, pixels from the left, red, green, blue.
    assert expected[0][64 * 3 * 5 + 3 * 7 + 1] == arrays[0][5, 7, 1]
    assert text.size == 12 * 12_288
    for split in ("train", "valid"):
        cut = samples.tar(files)[:2000]  # within the second image
        (tmp_path / f"{split}_64x64.tar").write_bytes(cut)
    with pytest.raises(UserError, match="not a whole archive"):
        images.read(origin(images.CORPUS, tmp_path))


def test_images_of_folders_are_ordered_by_name(tmp_path):
    samples.write_images(tmp_path)
    found = texts(images.read(origin(images.CORPUS, tmp_path)))
    assert found["train"] == [x.tobytes() for x in samples.pixels(5)]
    assert found["test"] == found["validation"]
    (tmp_path / "train_64x64" / "0000002.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"0000002\.png: not a PNG file, or cut off"):
        texts(images.read(origin(images.CORPUS, tmp_path)))


def wrong_images():
    image = samples.pixels(1)[0]
    whole = samples.png(image)
    yield whole[:-40], "a damaged PNG file"
    yield whole[:60] + b"\0\0" + whole[62:], "a damaged PNG file"
    yield b"GIF89a" + whole[6:], "not a PNG file"
    yield samples.png(image[:32]), "expected 64 x 64 pixels .* found 64 x 32 of 8-bit"
    yield samples.png(image[..., 0]), ".* found 64 x 64 of 8-bit grey"
    deep = image[..., 0].astype(np.uint16)
    yield samples.png(deep), ".* found 64 x 64 of 16-bit grey"
    alpha = np.concatenate([image, image[..., :1]], -1)
    yield samples.png(alpha), ".* found 64 x 64 of 8-bit RGBA"


def test_what_is_no_such_image_is_one_line(monkeypatch):
    for data, message in wrong_images():
        with pytest.raises(UserError, match=f"^here: {message}"):
            images.pixels(data, "here")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"pip install 'xlformer\[images\]'"):
        images.pixels(b"", "here")


def test_segments_are_images(tmp_path):
    samples.write_images(tmp_path / "own")
    found = prepare(data_config("imagenet64", tmp_path / "own"), directory=tmp_path)
    assert found.vocabulary.symbols == tuple(range(256))
    record = found.card["record"]
    options = {"batch_size": 2, "segment_length": record, "record": record}
    stream = Stream(found.tokens["train"], **options)
    # Five images in two rows: two each, and the last target is of the second.
    assert stream.row_length == 2 * record and stream.steps_per_epoch == 1
    expected = samples.pixels(5).reshape(5, record)[[0, 2]]
    np.testing.assert_array_equal(stream.at(0)["inputs_BT"], expected)


# Books --------------------------------------------------------------------------------


def test_books_come_one_by_one(tmp_path):
    samples.write_pg19(tmp_path)
    text = pg19.read(origin(pg19.CORPUS, tmp_path))
    books = [samples.book(number).encode() for number in (11, 12)]
    assert texts(text)["validation"] == books
    assert text.facts["books"] == dict.fromkeys(SPLITS, 2)
    assert text.facts["words_published"]["test"] == 6_966_499
    (tmp_path / "train" / "2.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"train/2\.txt: the book is empty"):
        texts(pg19.read(origin(pg19.CORPUS, tmp_path)))
    (tmp_path / "train" / "2.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"train/2\.txt: byte 0xe9 at offset 3"):
        texts(pg19.read(origin(pg19.CORPUS, tmp_path)))
    (tmp_path / "validation").rename(tmp_path / "valid")
    with pytest.raises(UserError, match="validation has no books"):
        pg19.read(origin(pg19.CORPUS, tmp_path))


def test_books_become_pieces_that_keep_all_of_their_text(tmp_path):
    samples.write_pg19(tmp_path / "own")
    data = data_config("pg19", tmp_path / "own", documents=True)
    found = prepare(data, directory=tmp_path)
    assert found.card["unit"] == "pieces" and found.card["tokenizer"] == (
        "sentencepiece:32768"
    )
    for split, number in zip(SPLITS, (0, 10, 20), strict=True):
        books = [samples.book(number + i) for i in (1, 2)]
        ids, start = found.tokens[split][:], found.documents[split][1]
        decoded = [found.vocabulary.decode(x) for x in (ids[:start], ids[start:])]
        assert decoded == books
        words = sum(len(x.split()) for x in books)
        assert found.card["splits"][split]["words"] == words


# All three ----------------------------------------------------------------------------


def test_another_folder_is_another_corpus(tmp_path):
    keys = []
    for name, more in (("a", b""), ("b", b""), ("c", b">x\nMK\n")):
        samples.write_proteins(tmp_path / name)
        path = tmp_path / name / "few.fasta"
        path.write_bytes(path.read_bytes() + more)
        keys.append(recipes.recipe(data_config("trembl", tmp_path / name)).key())
    assert keys[0] == keys[1] != keys[2]
    # In the folders of others, too, whose names are the same.
    keys = []
    for name, more in (("d", ""), ("e", ""), ("f", "more")):
        book = tmp_path / name / "train" / "1.txt"
        book.parent.mkdir(parents=True)
        book.write_text("a book" + more)
        keys.append(recipes.recipe(data_config("pg19", tmp_path / name)).key())
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(UserError, match="manual_dir=.*: cannot be read"):
        recipes.recipe(data_config("trembl", tmp_path / "none"))


@pytest.mark.parametrize(
    ("corpus", "fields", "message"),
    [
        ("trembl", {"alphabet": "bytes"}, "the 25 symbols of trembl are fixed"),
        ("imagenet64", {"tokenizer": "x"}, "the 256 symbols of imagenet64 are fixed"),
        ("trembl", {"newline": "drop"}, "newline=drop is for the bytes of enwik8$"),
        ("penn", {"documents": True}, "are of pg19, imagenet64, trembl too"),
    ],
)
def test_what_does_not_fit_them_is_refused(corpus, fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        recipes.check(data_config(corpus, tmp_path, **fields))
