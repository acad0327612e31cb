"""Where compiled programs are kept, for whom, and what becomes of half of one."""

import pathlib

import jax
import pytest

from xlformer import compiled
from xlformer.errors import UserError


def test_compiled_programs_lie_in_a_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XLFORMER_DATA", str(tmp_path / "cache"))
    folder = pathlib.Path(compiled.own_folder())
    assert folder.parent == tmp_path / "cache"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert compiled.own_folder() == str(folder)
    folder.chmod(0o770)
    with pytest.raises(UserError, match="can be written by others"):
        compiled.own_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="not a directory of this user"):
        compiled.own_folder()


def test_a_program_that_was_kept_by_half_is_made_whole(tmp_path, monkeypatch):
    """JAX writes no other one while there is one without its time of use."""
    monkeypatch.setenv("XLFORMER_DATA", str(tmp_path))
    folder = pathlib.Path(compiled.own_folder())
    (folder / "jit_f-cache").write_bytes(b"program")
    for name in ("jit_g-cache", "jit_g-atime", "jit_h-atime"):
        (folder / name).write_bytes(b"as it was")
    monkeypatch.setattr(compiled, "_named", lambda: "")
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    compiled.keep()
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["jit_f-atime", "jit_f-cache", "jit_g-atime", "jit_g-cache",
                     "jit_h-atime"]  # fmt: skip
    time = int.from_bytes((folder / "jit_f-atime").read_bytes(), "little")
    assert time == (folder / "jit_f-cache").stat().st_mtime_ns
    assert (folder / "jit_g-atime").read_bytes() == b"as it was"


def test_a_cache_that_cannot_be_made_is_no_cache(monkeypatch, capsys):
    monkeypatch.setenv("XLFORMER_DATA", "/dev/null/x")
    monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("a cache"))
    compiled.keep()  # One that was named goes before.
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(compiled, "_named", lambda: "")
    compiled.keep()
    (line,) = capsys.readouterr().err.splitlines()
    assert "compiled programs are not kept" in line and "/dev/null/x" in line
