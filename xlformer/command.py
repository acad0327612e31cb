"""What every command shares: one-line errors, exit code 2, flags with suggestions."""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import pathlib
import platform
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax

from xlformer import __version__, storage, streams
from xlformer.errors import (
    BAD_INPUT,
    UserError,
    WorthAnotherTry,
    did_you_mean,
    is_out_of_memory,
    reason,
)

OVERRIDE = "--config."
# What a directory or a disk may answer whoever asks: it becomes one line. Any other
# OSError is a mistake of this program and keeps its trace.
_DENIED = "EACCES EPERM ENOENT ENOTDIR EISDIR EEXIST EROFS ENOSPC EDQUOT EFBIG"
_DENIED += " ENAMETOOLONG ELOOP EIO ESTALE ENOTEMPTY EBUSY EMFILE ENFILE ENXIO ENODEV"
OF_FILES = {getattr(errno, name) for name in _DENIED.split()}
LONGEST = 4095  # bytes of a path, on Linux
# The flags of the command that runs, without their dashes: what a library says of an
# argument is shown as the flag that the person typed.
_typed: set[str] = set()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors, with --version.

    Flags are never abbreviated: a typo must not pick a flag.
    """

    def __init__(self, *, prog: str, description: str | None = None):
        super().__init__(
            allow_abbrev=False,
            prog=_as_started(prog),
            description=description,
            # Module docstrings hold examples, whose line breaks have a meaning.
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument(
            "--version",
            action="version",
            version=version(),
            help="of xlformer, jax and Python",
        )

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")

    def parse_with_overrides(
        self, argv: Sequence[str] | None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses argv; returns the flags and the `--config.a.b=v` items as 'a.b=v'."""
        names = {flag for action in self._actions for flag in action.option_strings}
        _typed.clear()
        _typed.update({"config."}, (name.removeprefix("--") for name in names))
        argv = list(_joined(sys.argv[1:] if argv is None else argv))
        # Before parsing, which would say of a misspelt required flag that it is
        # missing.
        self._refuse_unknown(item for item in argv if item.startswith("--"))
        args, rest = self.parse_known_args(argv)
        self._refuse_unknown(rest)
        return args, [item[len(OVERRIDE) :] for item in rest]

    def _refuse_unknown(self, items: Iterable[str]) -> None:
        flags = [name for action in self._actions for name in action.option_strings]
        for item in items:
            name = item.partition("=")[0]
            if name not in flags and not item.startswith(OVERRIDE):
                near = did_you_mean(name, flags)
                raise UserError(f"unknown argument {item!r}{near}")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parses argv; an unknown flag is an error that names the nearest known one."""
        args, overrides = self.parse_with_overrides(argv)
        if overrides:
            raise UserError(
                f"--config.{overrides[0]}: this command takes no config overrides"
            )
        _typed.discard("config.")
        return args


def _joined(argv: Sequence[str]) -> Iterator[str]:
    """Joins `--config.a.b v` to `--config.a.b=v`: other flags take a space as well."""
    items = iter(argv)
    for item in items:
        if item.startswith(OVERRIDE) and "=" not in item:
            value = next(items, "--")
            if value.startswith("--"):
                raise UserError(f"{item} needs a value: {item}=VALUE")
            item = f"{item}={value}"
        yield item


def _as_started(prog: str) -> str:
    """'python -m xlformer.train' where that is how the command was started."""
    *_, folder, name = ["", *pathlib.PurePath(sys.argv[0] or "python").parts]
    if name == "xlformer":  # The console script.
        return prog.replace("python -m xlformer.", "xlformer ")
    if folder == "xlformer" and name.strip("_") == "main__.py":
        return prog.replace("python -m xlformer.", "python -m xlformer ")
    return prog


def version() -> str:
    return (
        f"xlformer {__version__}, jax {jax.__version__}, "
        f"Python {platform.python_version()}"
    )


def run(main: Callable[[Sequence[str] | None], int], argv=None) -> int:
    """Calls main(argv); an error that is the user's becomes one line, exit code 2."""
    streams.stand_in()
    streams.pass_over_abandoned()
    _typed.clear()
    # In a notebook or a test standard output is an object that cannot.
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal that lacks a character shows '?'.
        sys.stdout.reconfigure(errors="replace")
    try:
        return _written(main, argv)
    except WorthAnotherTry as error:
        print(f"error: {line(error)}", file=sys.stderr)
        return 1
    except UserError as error:
        message = line(error)
    except MemoryError as error:
        message = f"out of memory: {reason(error)}"
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = f"out of memory on the device: {reason(error)}"
    except (RuntimeError, AssertionError):
        # JAX raises these where the platform that was asked for is not there, at the
        # first use of a device. Whatever else they are keeps its trace.
        message = _missing_platform()
        if not message:
            raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        # What a shell makes of a process that a signal ended.
        return 128 + signal.SIGINT
    # `... | head` has read what it wanted: no error. Before OSError, which it is too.
    except BrokenPipeError:
        streams.drop_stdout()
        return 0
    except OSError as error:
        if error.errno not in OF_FILES:
            raise
        message = _of_files(error, sys.argv[1:] if argv is None else argv)
        # The disk may be full to which standard output is redirected.
        if streams.drop_stdout():
            message = f"standard output: {message}"
    print(f"error: {message}", file=sys.stderr)
    return BAD_INPUT


def line(error: UserError) -> str:
    """The line of an error, for the person who typed the flags of this command."""
    return error.line(_typed)


def _written(main: Callable[[Sequence[str] | None], int], argv) -> int:
    """Calls main(argv); what it printed is written before the exit code is known."""
    try:
        code = main(argv)
    # argparse leaves this way after --help and --version.
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def place(text: str) -> str:
    """Checks and expands the path that a flag names; for add_argument's type."""
    # An unset variable of a script, which does not mean the directory that it runs in.
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        text.encode()
    # Orbax cannot name a directory whose path is not UTF-8.
    except UnicodeEncodeError:
        line = f"the path is not UTF-8: {os.fsencode(text)!r}"
        raise argparse.ArgumentTypeError(line) from None
    if len(os.fsencode(text)) > LONGEST:
        raise argparse.ArgumentTypeError(f"the path has more than {LONGEST} bytes")
    return os.fspath(storage.path(text))


def _missing_platform() -> str:
    """Which platform was asked for and is not there; '' if that is not what failed."""
    wanted = jax.config.jax_platforms
    if not wanted:
        return ""
    try:
        jax.devices()
        return ""
    # JAX has no type of its own for it: RuntimeError, or an assertion without a text.
    except (RuntimeError, AssertionError) as error:
        why = reason(error).removeprefix("Unable to initialize backend ")
        why = "" if isinstance(error, AssertionError) else f" ({why})"
    # JAX keeps the failure; without the wish it looks for what there is.
    jax.config.update("jax_platforms", None)
    found = f"{len(jax.devices())} x {jax.devices()[0].platform}"
    return (
        f"JAX_PLATFORMS={wanted}: there is no such device, or JAX was installed "
        f"without support for it{why}; this machine has {found}"
    )


def _of_files(error: OSError, argv: Sequence[str]) -> str:
    """The line of a folder or file that cannot be used, by the flag that named it."""
    what = error.strerror or reason(error)
    if error.filename is None:
        return what
    path = _absolute(os.fsdecode(error.filename))
    named = [(_absolute(value), text) for value, text in _named_paths(argv)]
    holding = [x for x in named if len(x[0].parts) > 1 and path.is_relative_to(x[0])]
    leading = [x for x in named if x[0].is_relative_to(path)]
    if not holding and not leading:
        return f"{path}: {what}"
    # The flag whose path is nearest: the longest that holds the file.
    place, text = max(holding or leading, key=lambda x: len(x[0].parts))
    return f"{text}: {what}" + ("" if place == path else f": {path}")


def _absolute(place: str) -> pathlib.Path:
    return pathlib.Path(os.path.abspath(os.path.expanduser(place)))


def _named_paths(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields what among the arguments may be a path, and how a person named it."""
    for item, following in itertools.pairwise([*argv, ""]):
        name, equals, value = item.partition("=")
        value = value if equals else following
        if name.startswith("--") and value:
            yield value, f"{name}={value}"
    # The cache is used without being named: then its variable is what can be changed.
    unset = storage.CACHE_VARIABLE not in os.environ
    where = storage.cache()
    yield where, f"{storage.CACHE_VARIABLE}={where}" + " (the default)" * unset
