"""Forms of a text: pipes, byte order marks, UTF-16, line ends, archives, NUL bytes."""

import codecs
import gzip
import os
import threading

import counted
import pytest

from xlformer.data import local, prepared
from xlformer.errors import UserError
from xlformer.scoring import texts

TEXT = "na\u00efve cats\nsat on mats\n" * 7
RAW = TEXT.encode()


def joined(text) -> bytes:
    documents = (d for found in text.splits.values() for d in found)
    return b"".join(document.read() for document in documents)


@pytest.fixture
def file(tmp_path):
    def write(data):
        path = tmp_path / "book.txt"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("unit", ["chars", "words", "pieces"])
def test_a_byte_order_mark_is_no_part_of_any_file(unit, tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + RAW)
    found = local.read_files(f"{tmp_path}/a;{tmp_path}/b", unit)
    assert joined(found) == RAW * 2
    with pytest.raises(UserError, match="the text is empty"):
        (tmp_path / "a").write_bytes(codecs.BOM_UTF8)
        local.read_files(f"{tmp_path}/a", unit)


def test_bytes_are_bytes(file, capsys):
    for data in (codecs.BOM_UTF8 + RAW, RAW.replace(b"\n", b"\r"), b"\0\xff" * 99):
        assert joined(local.read_files(str(file(data)), "bytes")) == data
    assert capsys.readouterr().err == ""
    data = TEXT.encode("utf-16")
    assert joined(local.read_files(str(file(data)), "bytes")) == data
    line = "book.txt is UTF-16, whose bytes are taken as they are: iconv -f UTF-16 -t"
    assert line in capsys.readouterr().err


def test_line_ends_are_those_of_python_for_words_and_kept_for_characters(file):
    ends = RAW.replace(b"\n", b"\r", 5).replace(b"\n", b"\r\n", 4)
    words = counted.words([RAW])
    expected = words.encode(RAW).tolist()
    path = file(ends)
    assert words.encode(joined(local.read_files(str(path), "words"))).tolist() == (
        expected
    )
    assert prepared.encode_file(words, path).tolist() == expected
    assert words.encode(path.read_text(encoding="utf-8")).tolist() == expected
    assert joined(local.read_files(str(path), "chars")) == ends
    chars = counted.chars([ends])
    assert chars.decode(prepared.encode_file(chars, path)).encode() == ends
    # Windows' line ends are as they were: the checksum of such a text stays.
    path = file(RAW.replace(b"\n", b"\r\n"))
    assert joined(local.read_files(str(path), "words")) == path.read_bytes()


REFUSED = {
    "utf-16": (TEXT.encode("utf-16"), "is UTF-16 and no UTF-8.* iconv -f UTF-16 -t"),
    "utf-32": (TEXT.encode("utf-32"), "is UTF-32 and no UTF-8.* iconv -f UTF-32 -t"),
    "LE": (
        TEXT.encode("utf-16-le"),
        "NUL bytes .161, .* 1.: .*iconv -f UTF-16LE .*corpus=text with unit=bytes",
    ),
    "BE": (TEXT.encode("utf-16-be"), "NUL bytes .161, .* 0.: .*iconv -f UTF-16BE"),
    "latin-1": (TEXT.encode("latin-1"), "byte 0xef at offset 2 .*iconv -f LATIN1 -t"),
    "damaged": (RAW + b"\xe2\x82", "byte 0xe2 at offset 168 .*iconv -c -f UTF-8 -t"),
    "gzip": (gzip.compress(RAW), "is compressed by gzip and .*: gunzip it"),
    "zip": (b"PK\x03\x04" + b"\0" * 99, "zip archive or an office document"),
    "pdf": (b"%PDF-1.4\n" + RAW, "is a PDF and .*: pdftotext"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_utf8_is_refused_with_advice(case, file):
    data, message = REFUSED[case]
    path, vocabulary = file(data), counted.chars([RAW])
    for read in (
        lambda: local.read_files(str(path), "chars"),
        lambda: local.read_files(str(path), "words"),
        lambda: prepared.encode_file(vocabulary, path),
    ):
        with pytest.raises(UserError, match=f"{path}.*{message}"):
            read()


def test_names_of_files(tmp_path):
    for name in ("a;b [c]", "b [c]"):
        (tmp_path / name).write_bytes(RAW)
        assert joined(local.read_files(f"{tmp_path}/{name}", "chars")) == RAW
    with pytest.raises(UserError, match=f"is a directory: use {tmp_path}/[*]$"):
        local.read_files(f"{tmp_path}/", "chars")


def test_a_lone_nul_is_said_and_kept(file, capsys):
    data = RAW * 2 + b"\0" + RAW
    assert joined(local.read_files(str(file(data)), "chars")) == data
    line = f"book.txt has NUL bytes (1, the first at offset {2 * len(RAW)})\n"
    assert capsys.readouterr().err.endswith(line)


@pytest.fixture
def pipe(tmp_path):
    """A function that gives a name under which data can be read once."""
    threads = []

    def give(data):
        path = tmp_path / f"fifo{len(threads)}"
        os.mkfifo(path)
        threads.append(threading.Thread(target=path.write_bytes, args=(data,)))
        threads[-1].start()
        return path

    yield give
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture
def stdin():
    """A function that makes data the standard input."""
    before = os.dup(0)

    def give(data):
        reading, writing = os.pipe()
        os.write(writing, data)
        os.close(writing)
        os.dup2(reading, 0)
        os.close(reading)

    yield give
    os.dup2(before, 0)
    os.close(before)


ONCE = "can be read only once: save the text as a file"


def test_a_pipe_is_read_once_and_says_so(pipe, capsys):
    assert joined(local.read_files(str(pipe(RAW)), "words")) == RAW
    assert ONCE in capsys.readouterr().err
    vocabulary = counted.words([RAW])
    path = pipe(codecs.BOM_UTF8 + RAW)
    tokens, _, facts = texts.own_text(vocabulary, str(path))
    assert tokens.tolist() == vocabulary.encode(RAW).tolist()
    assert facts["bytes"] == len(RAW) and facts["words"] == len(tokens)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input_is_a_text(name, stdin, capsys):
    stdin(RAW)
    assert joined(local.read_files(name, "chars")) == RAW
    assert f"config.data.path={name}: a pipe {ONCE}" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"{name}.: the text is empty: .*{ONCE}"):
        local.read_files(name, "chars")  # as a run does that is resumed
    stdin(RAW)
    assert prepared.open_text(counted.bytes([RAW]), name).read() == RAW
    with pytest.raises(UserError, match=f"no such file: /dev/fd/987: .*{ONCE}"):
        local.read_files("/dev/fd/987", "chars")
