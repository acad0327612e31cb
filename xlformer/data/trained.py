"""Tokenizers that are trained on a sample of a text, by the libraries that have them.

Both keep all of a text, line ends among it: byte-level pairs of Hugging Face's
`tokenizers`, and a unigram model of SentencePiece, whose unknown characters become
their bytes. The same sample gives the same pieces, with the same library.
"""

from __future__ import annotations

import importlib.metadata
import io
import re
from collections.abc import Callable, Iterator

from xlformer.data import parts, pieces
from xlformer.errors import UserError

NAMED = re.compile(r"(sentencepiece|tokenizers):(.*)", re.DOTALL)
SIZE = re.compile(r"[1-9]\d{0,6}")
# What SentencePiece says of too few.
FEW = re.compile(r"(?s).*smaller than required_chars\. \d+ vs (\d+).*")
# Parts of train that SentencePiece is trained on at most, and bytes of each: it keeps
# them in memory, several times as large, and 16 MiB take it two minutes. The other
# library keeps a count of words, and takes all of train.
PARTS, OF_EACH = 128, 1 << 17


def is_named(tokenizer: str) -> bool:
    """Whether config.data.tokenizer asks for one that is trained, and names no file.

    UserError where it does not say of how many pieces.
    """
    found = NAMED.fullmatch(tokenizer)
    if found and not SIZE.fullmatch(found[2]):
        raise UserError(
            f"config.data.tokenizer={tokenizer}: expected a number of pieces from 1 to "
            f"9999999, as in {found[1]}:32768"
        )
    return bool(found)


def train(
    name: str, count: int, part: Callable[[int], parts.Part]
) -> tuple[pieces.PieceVocabulary, dict]:
    """Trains what `name` asks for; returns it, and what the card says of it.

    Args:
      name: sentencepiece:N or tokenizers:N, with N pieces. A small text has fewer.
      count: the parts of train.
      part: gives the one of a number.
    """
    library, size = NAMED.fullmatch(name).groups()
    is_all = library == "tokenizers"
    every = 1 if is_all else -(-count // PARTS)
    sample = Sample(range(0, count, every), part, None if is_all else OF_EACH)
    trainer = _tokenizers if is_all else _sentencepiece
    try:
        data = trainer(sample.lines(), int(size))
    except ImportError as error:
        raise UserError(f"{error}: pip install 'xlformer[tokenizers]'") from None
    except UserError:
        raise
    # The libraries raise RuntimeError and plain Exception.
    except Exception as error:
        why = FEW.sub(r"its characters and bytes need \1 pieces at least", str(error))
        raise UserError(f"config.data.tokenizer={name}: {why:.200}") from error
    found = pieces.of_file(data, name)
    about = {
        "tokenizer": name,
        "trained_by": f"{library} {importlib.metadata.version(library)}",
        "trained_on": f"train: {sample.lines_read} lines, {sample.bytes} bytes, of "
        f"{len(sample.numbers)} of its {count} parts of 256 KiB (every {every})",
        "pieces": found.size,
    }
    return found, about


class Sample:
    """Lines of some parts of a text: of each the first `size` bytes; None is all."""

    def __init__(self, numbers: range, part: Callable, size: int | None):
        self.numbers, self._part, self._size = numbers, part, size
        self.bytes = self.lines_read = 0

    def lines(self) -> Iterator[str]:
        for number in self.numbers:
            data = self._part(number).data
            if self._size is not None and len(data) > self._size:
                # Whole lines; one that is longer is cut, as its part is.
                stop = data.rfind(b"\n", 0, self._size) + 1
                data = data[: stop or self._size]
            lines = data.decode("utf-8", "ignore").split("\n")
            ends = [True] * (len(lines) - 1) + [False]
            for line, end in zip(lines, ends, strict=True):
                if line or end:
                    self.lines_read += 1
                    yield line + "\n" * end
            self.bytes += len(data)


def _sentencepiece(lines: Iterator[str], size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line.rstrip("\n") for line in lines),
        model_writer=model,
        vocab_size=size,
        # Of a small text there are fewer.
        hard_vocab_limit=False,
        model_type="unigram",
        # Nothing of the text is changed, and nothing of it is unknown.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        # Longer lines would be left out.
        max_sentence_length=OF_EACH,
        input_sentence_size=0,
        # The pieces depend on their number, and not on how many processors there are.
        num_threads=4,
        minloglevel=2,
    )
    return model.getvalue()


def _tokenizers(lines: Iterator[str], size: int) -> bytes:
    import tokenizers

    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet):
        line = f"config.data.tokenizer=tokenizers:{size}: its bytes are"
        raise UserError(f"{line} {len(alphabet)} pieces already")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    model.train_from_iterator(lines, trainer)
    return model.to_str().encode("utf-8")
