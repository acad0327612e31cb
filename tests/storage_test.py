"""Writing whole or not at all: what a disk or a store answers becomes one line."""

import types

import pytest
from training_runs import refusal

from xlformer import command, storage
from xlformer.errors import UserError, WorthAnotherTry

PLACE = "gs://bucket/run/card.json"
WRITERS = [storage.put, storage.write]


@pytest.fixture
def refused(monkeypatch):
    """Lets a store answer everything with an error."""

    def by(error):
        def refuse(*_, **__):
            raise error

        names = ("read_bytes", "write_bytes", "write_text", "mkdir", "unlink")
        path = types.SimpleNamespace(**dict.fromkeys(names, refuse))
        epath = types.SimpleNamespace(Path=lambda _: path)
        monkeypatch.setattr(storage, "epath", epath)
        return path

    return by


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("error", "code"),
    [
        # gcsfs: of credentials that may only read, of others, of no network, no bucket.
        (OSError("Forbidden: bucket\nno storage.objects.create"), 1),
        (RuntimeError("('invalid_grant', 'expired')"), 1),
        (ConnectionError(111, "refused"), 1),
        (FileNotFoundError("bucket/run/card.json"), 2),
    ],
)
def test_what_a_store_refuses_is_one_line(write, error, code, refused, capsys):
    refused(error)
    assert command.run(lambda _: write(PLACE, "text")) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {PLACE}: cannot be written: ")
    assert " ".join(str(error).split()) in line


def test_a_folder_that_a_store_does_not_make_is_one_line(refused):
    path = refused(RuntimeError("no"))
    with pytest.raises(WorthAnotherTry):
        with storage.answering("picture", PLACE):
            path.unlink()
    # A defect of this program keeps its trace, and a disk's error its number.
    for error in (RuntimeError("no"), OSError(28, "full")):
        with pytest.raises(type(error)), storage.answering("picture", "/here"):
            raise error


@pytest.mark.parametrize("write", WRITERS)
def test_what_a_disk_refuses_is_one_line_and_leaves_nothing(write, tmp_path):
    (tmp_path / "folder").mkdir()
    path = storage.path(tmp_path / "folder")
    assert refusal(write, path, "é") == f"{path}: cannot be written: Is a directory"
    path = storage.path(tmp_path / "nowhere" / "a")
    line = refusal(write, path, "é")
    assert line == f"{path}: cannot be written: No such file or directory"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    path = storage.path(tmp_path / "a")
    write(path, "é")
    write(path, "ê")
    assert path.read_bytes() == "ê".encode()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder"]
    assert issubclass(WorthAnotherTry, UserError)
