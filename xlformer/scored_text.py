"""The text that an evaluation scores, and what its card says about it."""

from __future__ import annotations

import hashlib

import numpy as np

from xlformer import prepare, runs
from xlformer.data.prepared import Prepared, read_text
from xlformer.data.vocabulary import Vocabulary, WordVocabulary
from xlformer.errors import UserError


def read(run: runs.Run, split: str, text: str | None):
    """Tokens, where documents begin, and what the card says about them."""
    if text is not None:
        return own_text(run.vocabulary, text)
    prepared = prepare.prepare(run.config.data, stored=True)
    if split not in prepared.tokens:
        raise UserError(f"--split={split} is none of {', '.join(prepared.tokens)}")
    tokens = _translated(prepared, split, run)
    card = prepared.card
    facts = {
        "corpus": card["corpus"],
        "unit": card["unit"],
        "newline": card["newline"],
        "split": split,
        "payload_sha256": card["payload_sha256"],
        **{k: card["splits"][split][k] for k in ("bytes", "words")},
        "words_are": card["words_are"],
    }
    return tokens, prepared.documents[split], facts


def own_text(vocabulary: Vocabulary, path: str):
    """As read, of a file; words are counted as preparation counts them."""
    content = read_text(vocabulary, path)
    tokens = vocabulary.encode(content, where=path)
    spaced = isinstance(vocabulary, WordVocabulary) and vocabulary.unit == "chars"
    lines = vocabulary.line_ends
    text = content.replace(b" ", b"").replace(b"_", b" ") if spaced else content
    words = len(text.split())
    if lines:
        words += content.count(b"\n") + (not content.endswith(b"\n"))
    facts = {
        "corpus": path,
        "unit": vocabulary.unit,
        "newline": getattr(vocabulary, "newline", "keep"),
        "split": "text",
        "payload_sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "words": len(tokens) if vocabulary.unit == "words" else words,
        "words_are": "between white space" + ", and <eos> of each line" * lines,
    }
    return tokens, None, facts


def _translated(prepared: Prepared, split: str, run: runs.Run) -> np.ndarray:
    """The split in the run's ids: converted weights may have another order."""
    ours, theirs = run.vocabulary.symbols, prepared.vocabulary.symbols
    if ours == theirs:
        return prepared.tokens[split]
    if set(ours) != set(theirs):
        raise UserError(
            f"{runs.VOCABULARY} of the run has {len(ours)} symbols and the prepared "
            f"data {len(theirs)}, {len(set(ours) & set(theirs))} of them the same: "
            "another text or corpus"
        )
    index = {symbol: i for i, symbol in enumerate(ours)}
    table = np.array([index[symbol] for symbol in theirs], run.vocabulary.dtype)
    return table[prepared.tokens[split]]
