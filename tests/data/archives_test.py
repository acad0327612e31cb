"""Files in archives, which are read where they lie."""

import io
import tarfile

import pytest

from xlformer.data import archives, documents
from xlformer.errors import UserError

FILES = {"a": b"1" * 1500, "./b/c": b"", "../d": b"22", "/e": b"3" * 512}


def packed(mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as opened:
        for name, data in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
        for name, kind in (("link", tarfile.SYMTYPE), ("folder", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            opened.addfile(member)
    return buffer.getvalue()


@pytest.fixture
def origin(tmp_path):
    found = archives.Origin("made", (), None, "")
    found.scratch = str(tmp_path / "scratch")
    return found


def read(origin, data):
    source = documents.Source("made.tar", data)
    return dict(archives.members(origin, source, lambda name: True))


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_members_are_read_in_any_order_and_get_no_path(mode, origin, tmp_path):
    found = read(origin, packed(mode))
    assert list(found) == [name.removeprefix("./") for name in FILES]
    for name, data in reversed(FILES.items()):
        assert found[name.removeprefix("./")].read() == data
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_archives_that_are_not_whole_are_one_line(origin):
    data = packed("w:")
    # In a header, in a file, behind one, and damage where a header is expected.
    cuts = [data[:100], data[:1500], data[:2560], data[:2560] + b"x" * 2048, b"x" * 999]
    for cut in [b"", *cuts, packed("w:gz")[:-9], b"\x1f\x8b"]:
        with pytest.raises(UserError, match="^made.tar: not a whole archive: "):
            read(origin, cut)


def test_a_source_is_read_like_a_file(monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 7)
    data = bytes(range(50))
    reader = archives.Reader(documents.Source("made", data))
    for place, size in ((0, 3), (3, 20), (5, 2), (6, 0), (49, 9), (50, 1), (0, -1)):
        assert reader.seek(place) == place
        assert reader.read(size) == data[place:][: size if size >= 0 else None]
    assert reader.tell() == 50 and reader.seek(-4, 2) == 46 and reader.seek(-6, 1) == 40
