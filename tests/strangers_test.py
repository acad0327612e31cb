"""Files that anybody may have made: read to an end, or refused at once."""

import json
import os

import pytest
from training_runs import refusal

from xlformer import strangers
from xlformer.data import lists, lm1b, pieces
from xlformer.errors import WorthAnotherTry


def nested(levels):
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"1" * 9999, b"[" * 100_000, b'{"a":' * 100_000]
    + [nested(strangers.DEEPEST + 1).encode(), nested(900).encode(), b'"' + b"x" * 100],
    ids=range(9),
)
def test_json_of_a_stranger_is_a_value_or_a_value_error(content, tmp_path):
    path = tmp_path / "card.json"
    path.write_bytes(content)
    with pytest.raises(ValueError):
        strangers.read_json(path)


def test_what_is_json_is_read_whatever_the_locale(tmp_path):
    path = tmp_path / "card.json"
    found = {"a": json.loads(nested(strangers.DEEPEST - 1)), "ü": [1.5, None, "日"]}
    path.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    assert strangers.read_json(path) == strangers.read_json(str(path)) == found
    size = path.stat().st_size
    assert len(strangers.read(path, size)) == size
    with pytest.raises(ValueError, match=f"more than {size - 1} bytes"):
        strangers.read(path, size - 1)


def test_what_may_never_end_is_not_begun(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "link", "zero"):
        with pytest.raises(ValueError, match="a pipe or a device, which may never end"):
            strangers.read(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        strangers.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        strangers.read(tmp_path / "nothing")


def test_a_pipe_that_a_shell_made_is_a_persons(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, b"[1]")
    os.close(writing)
    assert strangers.read_json(f"/dev/fd/{reading}") == [1]
    os.close(reading)


def test_a_strangers_config_names_no_device():
    for read in (pieces.load_tokenizer, lambda path: lists.read(path, lm1b.CORPUS)):
        line = refusal(read, "/dev/zero")
        assert "/dev/zero" in line and "a pipe or a device" in line


def test_pipes_are_found_wherever_they_lie(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/file").write_text("x")
    (tmp_path / "a/broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "other")
    assert strangers.endless(tmp_path, ["a", "missing"]) is None
    os.mkfifo(tmp_path / "a/b/pipe")
    assert strangers.endless(tmp_path, ["a"]) == str(tmp_path / "a/b/pipe")
    assert strangers.endless(tmp_path, ["other"]) == str(tmp_path / "other")
    assert strangers.endless("gs://bucket", ["other"]) is None


def test_a_store_that_does_not_answer_is_worth_another_try(monkeypatch):
    class Path:
        def __init__(self, place):
            self.place = place

        def read_bytes(self):
            if "nothing" in self.place:
                raise FileNotFoundError(self.place)
            raise RuntimeError("no credentials")

    monkeypatch.setattr(strangers.storage, "path", Path)
    with pytest.raises(FileNotFoundError):
        strangers.read("gs://bucket/nothing")
    with pytest.raises(WorthAnotherTry, match="gs://bucket/a: cannot be read: no cred"):
        strangers.read("gs://bucket/a")
