"""A conversation with one memory: prompts from standard input, line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from xlformer.errors import UserError
from xlformer.generation import printing


def talk(continuation, vocabulary, *, num_tokens: int, stops=(), first="") -> None:
    """Continues each line of standard input until its end or Ctrl-C.

    What is read is the same as one long text: every prompt, then what was generated
    for it, up to the token that completed a stop text. A line's end sends the line and
    is not part of it; an empty line goes on where the last answer ended.

    Args:
      continuation: generate.Continuation of one row, which has read nothing yet.
      vocabulary: of the run.
      num_tokens: at most, for each prompt.
      stops: texts that end an answer.
      first: a prompt that comes before those of standard input.
    """
    # Prompts are read as text files are, whatever the locale is; bytes that are no
    # UTF-8 come through as they are (surrogateescape). A stand-in of a test, such as
    # StringIO, has no encoding to set.
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    before: list[int] = []  # generated, and not yet read
    try:
        for line in _lines(first):
            try:
                # Not closed by <eos>: the answer goes on in the prompt's own line.
                ids = vocabulary.encode(line, close_line=False, where="the prompt")
            except UserError as error:  # A slip at the keyboard ends nothing.
                print(f"error: {error}", file=sys.stderr)
                continue
            before = _turn(continuation, vocabulary, [*before, *ids], num_tokens, stops)
    except KeyboardInterrupt:
        print()


def _turn(continuation, vocabulary, ids, num_tokens: int, stops) -> list[int]:
    """Reads ids and answers; returns the answer's tokens."""
    if not ids:
        print("nothing to continue yet: type a beginning", file=sys.stderr)
        return []
    continuation.read([ids])
    row = printing.Row(vocabulary, ids, stops)
    # The person has typed the prompt: it stands on the terminal already.
    printer = printing.Printer([row], shown="")
    tokens_RN, _ = continuation.draw(num_tokens, on_tokens=printer)
    printer.finish()
    return tokens_RN[0, : row.tokens].tolist()


def _lines(first: str) -> Iterator[str]:
    if first:
        yield first
    while True:
        # To standard error, so that a redirected output holds answers alone.
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        yield line.removesuffix("\n").removesuffix("\r")
    if sys.stdin.isatty():
        print()
