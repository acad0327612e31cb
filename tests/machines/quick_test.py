"""What makes compiling quick: flags for this process and those that it starts."""

import pytest

from xlformer.machines import quick


@pytest.mark.parametrize(
    ("before", "after"),
    [("", "--a=0 --b=1"), ("--b=2 --c", "--b=2 --c --a=0"), ("--a=0 --b=1",) * 2],
)
def test_what_a_person_asks_of_xla_counts(monkeypatch, before, after):
    monkeypatch.setattr(quick, "flags", lambda: ("--a=0", "--b=1"))
    monkeypatch.setenv("XLA_FLAGS", before)
    quick.compile_quickly()
    assert quick.os.environ["XLA_FLAGS"] == after


def test_an_unknown_version_goes_without(monkeypatch):
    assert quick.flags()
    monkeypatch.setattr(quick.importlib.metadata, "version", lambda name: "0.11.0")
    assert quick.flags() == ()
