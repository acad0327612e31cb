"""Standard streams that are closed, full, or no longer read; see also command_test."""

import contextlib
import errno
import os
import sys

import pytest

from xlformer import __main__ as names
from xlformer import command, streams


def test_a_closed_stream_does_not_lend_its_number_to_a_file(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    streams.stand_in()
    assert sys.stdin.read() == ""
    print("nowhere")
    print("nowhere", file=sys.stderr)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        assert stream.name == os.devnull
        stream.close()


def test_a_read_that_was_abandoned_leaves_no_trace(monkeypatch, capsys):
    """As Orbax abandons them where a checkpoint has lost a file."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    command.run(_prints, [])
    for text in ("Event loop is closed", "anything else"):

        class Dropped:
            def __del__(self, text=text):
                raise RuntimeError(text)

        Dropped()
    err = capsys.readouterr().err
    assert err.count("Traceback") == 1 and "RuntimeError: anything else" in err


@contextlib.contextmanager
def full():
    """A device that is full, buffered as a pipe or a file is."""
    with open("/dev/full", "w") as stream, contextlib.redirect_stdout(stream):
        yield
        stream.flush()  # as Python does at its exit: nothing is left to fail


@contextlib.contextmanager
def unread():
    """A pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream, contextlib.redirect_stdout(stream):
        yield
        stream.flush()


def _prints(argv):
    print("a card")
    return 0


def test_what_cannot_be_written_is_said_once(capsys):
    with full():
        assert command.run(_prints, []) == command.BAD_INPUT
    line = f"error: standard output: {os.strerror(errno.ENOSPC)}\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("argv", [["train", "--version"], ["--help"], ["--version"]])
def test_a_reader_that_has_gone_is_no_error(argv, capsys):
    with unread():
        assert names.main(argv) == 0
    assert capsys.readouterr().err == ""


def test_ctrl_c_while_a_command_is_imported(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(names.importlib, "import_module", interrupted)
    assert names.main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
