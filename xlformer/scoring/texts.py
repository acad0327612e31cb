"""The text that an evaluation scores, and what its card says about it."""

from __future__ import annotations

import hashlib

from xlformer import progress, runs
from xlformer.data import encoding, parts, preparing, shards, translation
from xlformer.data.prepared import open_text
from xlformer.data.vocabulary import Vocabulary, WordVocabulary
from xlformer.errors import Argument, UserError
from xlformer.runs import stored


def read(run: runs.Run, split: str, text: str | None, data_path: str | None = None):
    """Tokens, where documents begin, and what the card says about them.

    text: a file to score in place of a split; data_path: where the run's text lies now.
    """
    if text is not None:
        if data_path is not None:
            raise UserError(
                Argument("text", text),
                " is another text than the run's, which ",
                Argument("data_path", data_path),
                " is: pass one of them",
            )
        return own_text(run.vocabulary, text)
    found = stored.read(run, split, data_path)
    # Weights that were converted, or trained on from others, have ids of their own.
    found = translation.translated(found, run.vocabulary, where=runs.VOCABULARY)
    card = found.card
    facts = {
        "corpus": card["corpus"],
        "unit": card["unit"],
        "newline": card["newline"],
        "split": split,
        "payload_sha256": card["payload_sha256"],
        **{k: card["splits"][split][k] for k in ("bytes", "words")},
        "words_are": card["words_are"],
        # What of the corpus one must know to compare.
        **{k: card[k] for k in ("protocol", "tokenizer", "record") if k in card},
    }
    return found.tokens[split], found.documents[split], facts


def own_text(vocabulary: Vocabulary, path: str):
    """What `read` returns, of a file; words are counted as preparation counts them."""
    document = open_text(vocabulary, path)
    # Characters with spaces between them are words to that vocabulary.
    spaced = isinstance(vocabulary, WordVocabulary) and vocabulary.unit == "chars"
    lines = vocabulary.line_ends
    digest, words = hashlib.sha256(), 0
    found = shards.Collector(vocabulary.dtype, vocabulary.size)
    with progress.counting(f"reading {path}", len(document)):
        for part in parts.of(document):
            found.add(vocabulary.encode_part(part, where=path))
            digest.update(part.data)
            words += encoding.words(part, spaced=spaced, lines=lines)
            progress.passed(len(part.data))
    tokens, begins = found.tokens(), getattr(vocabulary, "begins", False)
    facts = {
        "corpus": path,
        "unit": vocabulary.unit,
        "newline": getattr(vocabulary, "newline", "keep"),
        "split": "text",
        "payload_sha256": digest.hexdigest(),
        "bytes": len(document),
        "words": len(tokens) - begins if vocabulary.unit == "words" else words,
        "words_are": preparing.words_are(lines, getattr(vocabulary, "eos", "<eos>")),
    }
    return tokens, None, facts
