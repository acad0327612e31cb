"""Every builder on tiny files of its corpus's form, from a directory and by HTTP."""

import dataclasses
import hashlib
import http.server
import io
import logging
import subprocess
import sys
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from conftest import SHARED

from xlformer import config
from xlformer.data import local, recipes, sources
from xlformer.data.archives import Archive
from xlformer.errors import UserError
from xlformer.prepare import prepare

# The corpora that are one archive with one file or one a split.
FILES = [name for name, corpus in sources.CORPORA.items() if not corpus.read]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def data_config(corpus, **fields):
    data = config.default_config().data
    data.update(corpus=corpus, **fields)
    return data


def content(corpus, position):
    """A text that the corpus could hold, another one for each of its files."""
    if corpus.unit == "bytes":
        return bytes(range(251)) * 3 + b"<page>\n\xc3\n" * 40
    if not corpus.lines:
        return b" anarchism originated as a term of abuse " * 20
    lines = [b"a banknote <unk> N", b"", b" the board ", b"Mr. <unk>"][position:]
    if corpus.spaced:
        lines = [b" ".join(b"%c" % c for c in b.replace(b" ", b"_")) for b in lines]
    return b" \n".join(lines) + b" \n"


def archive_of(corpus, files):
    buffer = io.BytesIO()
    if corpus.archive.file.endswith(".zip"):
        with zipfile.ZipFile(buffer, "w") as opened:
            for name, data in files.items():
                opened.writestr(name, data)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as opened:
            for name, data in files.items():
                member = tarfile.TarInfo(f"./{name}")
                member.size = len(data)
                opened.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def tiny(monkeypatch, name, urls=(), pin_archive=True):
    """Replaces the sums of a corpus by those of tiny files; returns them."""
    corpus = sources.CORPORA[name]
    files = {path: content(corpus, i) for i, path in enumerate(corpus.files)}
    archive = archive_of(corpus, files)
    pinned = sha256(archive) if pin_archive else ""
    corpus = dataclasses.replace(
        corpus,
        archives=(Archive(corpus.archive.file, urls, pinned),),
        files={path: sha256(data) for path, data in files.items()},
        cut=(301, 103) if corpus.cut else (),
    )
    monkeypatch.setitem(sources.CORPORA, name, corpus)
    return corpus, files, archive


def expected_splits(corpus, files):
    parts = list(files.values())
    if corpus.cut:
        parts = [parts[0][:301], parts[0][301:404], parts[0][404:]]
    return dict(zip(sources.SPLITS, parts, strict=True))


@pytest.mark.parametrize("form", ["archive", "plain"])
@pytest.mark.parametrize("name", FILES)
def test_a_manual_directory_gives_every_corpus(name, form, monkeypatch, tmp_path):
    corpus, files, archive = tiny(monkeypatch, name)
    if form == "archive":
        (tmp_path / corpus.archive.file).write_bytes(archive)
    for path, data in files.items() if form == "plain" else ():
        # As it is unpacked, or without the archive's folders.
        place = tmp_path / (path if name == "penn" else path.rpartition("/")[2])
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    found = prepare(data_config(name, manual_dir=str(tmp_path)), directory=tmp_path)
    texts = expected_splits(corpus, files)
    assert found.card["payload_sha256"] == sha256(b"".join(texts.values()))
    assert found.card["files_sha256"] == {p: sha256(d) for p, d in files.items()}
    for split, text in texts.items():
        assert found.card["splits"][split]["bytes"] == len(text)
        ids = found.tokens[split]
        if corpus.lines:
            words = text.lower() if corpus.lower else text
            assert len(ids) == len(words.replace(b"\n", b" <eos> ").split())
            again = found.vocabulary.encode(found.vocabulary.decode(ids))
            np.testing.assert_array_equal(again, ids)
        else:
            decoded = found.vocabulary.decode(ids)
            assert decoded == (text if corpus.unit == "bytes" else text.decode())
    assert found.vocabulary.unit == corpus.unit
    if corpus.lines:
        assert found.vocabulary.symbols[0] == "<eos>"
    else:
        assert found.vocabulary.size == len(set(b"".join(files.values())))


def test_enwik8_can_drop_its_newlines(monkeypatch, tmp_path):
    corpus, files, archive = tiny(monkeypatch, "enwik8")
    (tmp_path / corpus.archive.file).write_bytes(archive)
    options = data_config("enwik8", manual_dir=str(tmp_path), newline="drop")
    found = prepare(options, directory=tmp_path)
    for split, text in expected_splits(corpus, files).items():
        decoded = found.vocabulary.decode(found.tokens[split])
        assert decoded == text.replace(b"\n", b"")
        assert found.card["splits"][split]["bytes"] == len(text)
    assert found.vocabulary.size == len(set(files["enwik8"])) - 1
    assert found.card["newline"] == "drop"


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_every_byte_may_be_a_symbol(name, monkeypatch, tmp_path):
    corpus, files, archive = tiny(monkeypatch, name)
    (tmp_path / corpus.archive.file).write_bytes(archive)
    options = data_config(name, manual_dir=str(tmp_path))
    counted = prepare(options, directory=tmp_path)
    options.alphabet = "bytes"
    found = prepare(options, directory=tmp_path)
    assert found.directory != counted.directory
    assert found.vocabulary.size == found.card["vocabulary_size"] == 256
    assert found.vocabulary.unit == found.card["unit"] == "bytes"
    for split, text in expected_splits(corpus, files).items():
        # The most common first, as elsewhere: the values that do not occur are behind.
        np.testing.assert_array_equal(found.tokens[split], counted.tokens[split])
        assert found.vocabulary.decode(found.tokens[split]) == text
    size = counted.vocabulary.size
    assert size < 256 and not found.vocabulary.counts_V[size:].any()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"corpus": "pennchar"}, "pennchar has chars"),
        ({"corpus": "wikitext2"}, "wikitext2 has words"),
        ({"corpus": "text", "path": "a.txt", "unit": "chars"}, "text has chars"),
        ({"corpus": "enwik8", "newline": "drop"}, "newline=drop, which leaves one"),
        ({"corpus": "enwik8", "tokenizer": "a.model"}, "its pieces are no bytes"),
    ],
)
def test_bytes_are_symbols_where_the_text_is_one_of_bytes(fields, expected):
    data = config.default_config().data
    data.update(fields, alphabet="bytes")
    with pytest.raises(UserError, match=expected) as raised:
        recipes.check(data)
    assert str(raised.value).startswith("config.data.alphabet=bytes")


def test_a_text_of_bytes_has_all_of_them_already(tmp_path):
    data = config.default_config().data
    names = []
    for alphabet in ("counted", "bytes"):
        data.update(corpus="stdlib", alphabet=alphabet)
        recipes.check(data)
        names.append(recipes.recipe(data).key())
    assert names[0] == names[1]


@pytest.fixture
def server():
    """A local HTTP server: files maps paths to bytes, asked lists what was fetched."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = files.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *arguments):
            pass

    files, asked = {}, []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{running.server_port}"
    yield url, files, asked
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.mark.parametrize("name", ["enwik8", "penn"])
def test_mirrors_are_tried_until_the_checksum_fits(name, monkeypatch, tmp_path, server):
    url, served, asked = server
    urls = tuple(f"{url}/{host}/{name}.bin" for host in ("gone", "other", "good"))
    corpus, files, archive = tiny(monkeypatch, name, urls)
    served[f"/other/{name}.bin"] = archive_of(corpus, {p: b"other" for p in files})
    served[f"/good/{name}.bin"] = archive
    found = prepare(data_config(name), directory=tmp_path)
    texts = expected_splits(corpus, files)
    assert found.card["payload_sha256"] == sha256(b"".join(texts.values()))
    hosts = list(dict.fromkeys(path.split("/")[1] for path in asked))
    assert hosts == ["gone", "other", "good"]


def test_wrong_downloads_name_both_sums_and_the_remedy(monkeypatch, tmp_path, server):
    url, served, asked = server
    urls = (f"{url}/a.zip", f"{url}/b.zip")
    corpus, files, archive = tiny(monkeypatch, "text8", urls)
    served["/a.zip"] = archive[:-7]
    with pytest.raises(UserError) as caught:
        prepare(data_config("text8"), directory=tmp_path)
    message = str(caught.value)
    assert "text8: no source worked" in message and "\n" not in message
    assert f"wrong checksum of {url}/a.zip" in message and "404" in message
    assert sha256(archive) in message and sha256(archive[:-7]) in message
    assert "put text8.zip" in message and "manual_dir='DIR'" in message
    # the wrong file is not kept: a mended mirror serves the next run
    served["/a.zip"] = archive
    assert prepare(data_config("text8"), directory=tmp_path).vocabulary.size == 17


def test_wrong_manual_files_name_both_sums_and_the_remedy(monkeypatch, tmp_path):
    corpus, files, archive = tiny(monkeypatch, "penn")
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_bytes(b"other\n")
    with pytest.raises(UserError) as caught:
        prepare(data_config("penn", manual_dir=str(tmp_path)), directory=tmp_path)
    message = str(caught.value)
    expected = next(iter(corpus.files.values()))
    for part in ("penn", str(tmp_path / "train.txt"), expected, sha256(b"other\n")):
        assert part in message
    assert "put simple-examples.tgz" in message and "manual_dir='DIR'" in message
    assert not [p for p in tmp_path.rglob("*") if "incomplete" in p.name]


def test_missing_manual_files_are_named(tmp_path):
    options = data_config("wikitext2", manual_dir=str(tmp_path))
    with pytest.raises(UserError, match="neither wikitext-2-v1.zip nor wiki.train.tok"):
        prepare(options, directory=tmp_path / "out")
    options.manual_dir = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="manual_dir=.*nowhere: no such directory"):
        prepare(options, directory=tmp_path / "out")


@pytest.mark.parametrize("name", ["penn", "text8"])
def test_an_archive_that_is_none_is_one_line(name, monkeypatch, tmp_path):
    corpus, _, _ = tiny(monkeypatch, name, pin_archive=False)
    options = data_config(name, manual_dir=str(tmp_path))
    other = archive_of(corpus, {"readme": b"no"})
    for data in (b"", b"no archive", other, other[: len(other) // 2]):
        (tmp_path / corpus.archive.file).write_bytes(data)
        with pytest.raises(UserError, match=f"{corpus.archive.file}.*manual_dir"):
            prepare(options, directory=tmp_path)


def test_what_no_sum_is_known_of_is_said(monkeypatch, tmp_path, caplog):
    corpus, files, archive = tiny(monkeypatch, "wikitext2")
    unpinned = dataclasses.replace(corpus, files=dict.fromkeys(files, ""))
    monkeypatch.setitem(sources.CORPORA, "wikitext2", unpinned)
    (tmp_path / corpus.archive.file).write_bytes(archive)
    options = data_config("wikitext2", manual_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        card = prepare(options, directory=tmp_path).card
    assert card["unpinned"] == list(files)
    assert "no checksum is pinned for" in caplog.text


def test_an_empty_file_names_itself_and_its_split(monkeypatch, tmp_path):
    corpus, files, _ = tiny(monkeypatch, "penn")
    files[list(files)[1]] = b""
    sums = {path: sha256(data) for path, data in files.items()}
    corpus = dataclasses.replace(corpus, files=sums)
    monkeypatch.setitem(sources.CORPORA, "penn", corpus)
    for path, data in files.items():
        (tmp_path / path.rpartition("/")[2]).write_bytes(data)
    with pytest.raises(UserError, match="ptb.valid.txt.*empty: split 'validation'"):
        prepare(data_config("penn", manual_dir=str(tmp_path)), directory=tmp_path)


def test_an_unknown_corpus_suggests_another():
    with pytest.raises(UserError, match="did you mean 'enwik8'"):
        prepare(data_config("enwik9"))


@pytest.mark.parametrize("name", ["penn", "pennchar"])
def test_penn_has_the_published_counts(name, data_directory):
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    found = prepare(data_config(name, manual_dir=str(folder)))
    splits = found.card["splits"]
    words = {"train": 929_589, "validation": 73_760, "test": 82_430}
    assert {split: splits[split]["words"] for split in splits} == words
    if name == "penn":
        assert {split: len(found.tokens[split]) for split in splits} == words
        assert found.vocabulary.size == 10_000
        assert found.vocabulary.symbols[:4] == ("<eos>", "the", "<unk>", "n")
    else:
        assert found.vocabulary.size == 50
    again = found.vocabulary.encode((folder / "test.txt").read_bytes())
    np.testing.assert_array_equal(again, found.tokens["test"])


def test_the_standard_library_is_split_by_hashed_names(tmp_path):
    (tmp_path / "package").mkdir()
    texts = {"a.py": b"aaaaaaaaaa", "package/b.py": b"b" * 70, "c.py": b"c" * 20}
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    left_out = ("test", "tests", "config-3.11-x86", "idlelib", "lib2to3", "encodings")
    for name in (*left_out, "pydoc_data", "site-packages", "package/tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "d.py").write_bytes(b"never")
    (tmp_path / "data.txt").write_bytes(b"never")
    names = sorted(texts, key=lambda name: sha256(name.encode()))
    data = b"".join(texts[name] for name in names)
    splits = local.read_stdlib(str(tmp_path)).splits
    found = [b"".join(d.read() for d in splits[split]) for split in sources.SPLITS]
    assert found == [data[:90], data[90:95], data[95:]]
    with pytest.raises(UserError, match="no .py files"):
        local.read_stdlib(str(tmp_path / "package" / "tests" / "nothing"))


def test_the_data_package_is_light_to_import():
    heavy = "tensorflow_datasets,tokenizers,sentencepiece,tensorflow,array_record"
    names = "corpora,counting,folders,local,pieces,prepared,sources,stream,vocabulary"
    code = (
        f"import sys; from xlformer.data import {names}; "
        f"print([m for m in '{heavy}'.split(',') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
