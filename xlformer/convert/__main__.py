"""Makes a work directory of other programs' weights, to be read like any run's:
python -m xlformer.convert --format=original --source=model.pt --workdir=DIR.

Nothing in a file of weights is run: npz, safetensors and PyTorch state dicts.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from xlformer import command, runs
from xlformer.convert import (
    awd_lstm,
    hugging_face,
    nvidia,
    portable,
    sha_rnn,
    tensorflow,
    tensorflow_vocabulary,
    transformer_xl,
)
from xlformer.convert.adopt import VOCAB_HELP, adopt, check_new, read_vocabulary
from xlformer.convert.files import read_json, read_state
from xlformer.data.documents import is_read_once
from xlformer.data.prepared import encode_file
from xlformer.errors import Argument, UserError, about
from xlformer.scoring import evaluation

# Enough to tell a wrong order of ids, whose loss is above what knowing nothing but the
# frequencies costs, from the right one.
PROBE_TOKENS = 20_000
DEFAULT_LENGTH = 64  # of a segment


class Read(NamedTuple):
    """What the reader of a format gives.

    Attributes:
      config, params: of the model.
      hparams: the original's arguments.
      vocabulary: where there is one beside the weights; or the file it is in, which is
        read only where no other one is named.
      step: of the training, where it is known.
      base: the run's config, where it is one of ours.
      note: a line to print in the end.
    """

    config: Any
    params: Any
    hparams: dict
    vocabulary: Any = None
    step: int = 0
    base: Any = None
    note: str = ""


class Format(NamedTuple):
    """A program whose weights are read.

    Attributes:
      read: (source, FILE of hparams or None) -> the fields of Read.
      length: which of its hparams is the length of a segment.
      about: for --help.
      has: why no FILE of hparams is taken, where none is.
    """

    read: Callable[[str, str | None], tuple]
    length: str
    about: str
    has: str = ""


def _state_dict(convert: Callable, *, needs_hparams: bool = True) -> Callable:
    """Reads a file for convert(state, hparams) -> config, params."""

    def read(source, named):
        state, hparams = read_state(source)
        vocabulary = _beside(pathlib.Path(source).parent)
        if named:
            hparams = read_json(pathlib.Path(named))
        if hparams is None:
            # Most state dicts carry no settings, and shapes alone do not tell heads
            # from widths.
            beside = pathlib.Path(source).with_name("hparams.json")
            if beside.is_file():
                hparams = read_json(beside)
            elif not needs_hparams:
                hparams = {}
            else:
                raise UserError(
                    f"{source} carries no hparams: pass --hparams=FILE.json with the "
                    f"original's arguments, or put {beside.name} beside it"
                )
        with about(Argument("source", source)):
            return (*convert(state, hparams), hparams, vocabulary)

    return read


def _beside(directory: pathlib.Path):
    """The vocabulary that writing.py left there, or None."""
    path = directory / runs.VOCABULARY
    return read_vocabulary(str(path)) if path.is_file() else None


def _hf(source, _):
    return *hugging_face.read(source), _beside(pathlib.Path(source))


def _tf(source, named):
    given = read_json(pathlib.Path(named)) if named else {}
    config, params, hparams, step = tensorflow.read(source, given)
    beside = tensorflow_vocabulary.beside(tensorflow.prefix_of(source))
    note = ""
    if assumed := {k: v for k, v in hparams.items() if k not in given}:
        listed = ", ".join(f"{name}={value}" for name, value in assumed.items())
        note = f"as in the original's script for this size, or its default: {listed}"
    return Read(config, params, hparams, beside, step, note=note)


def _ours(source, _):
    run = runs.load(source)
    return run.model.config, run.params, run.config.train.to_dict(), run.vocabulary


def _portable(source, _):
    found = portable.read(source)
    return Read(
        found.model_config,
        found.params,
        {},
        found.vocabulary,
        found.step,
        found.config,
    )


FORMATS = {
    "original": Format(
        _state_dict(transformer_xl.from_original),
        "tgt_len",
        "the PyTorch Transformer-XL",
    ),
    "hf": Format(
        _hf, "tgt_len", "Hugging Face's TransfoXL", has="which has config.json"
    ),
    "nvidia": Format(
        lambda source, _: nvidia.read(source),
        "tgt_len",
        "checkpoints of NVIDIA's Transformer-XL",
        has="whose checkpoints have them",
    ),
    "tf": Format(_tf, "tgt_len", "the TensorFlow Transformer-XL's checkpoints (V2)"),
    "awd_lstm": Format(
        _state_dict(awd_lstm.from_awd_lstm, needs_hparams=False),
        "bptt",
        "AWD-LSTM, its criterion's names after 'criterion.'",
    ),
    "sha_rnn": Format(
        _state_dict(sha_rnn.from_sha_rnn, needs_hparams=False), "bptt", "SHA-RNN"
    ),
    "xlformer": Format(
        _ours,
        "segment_length",
        "a run of ours, to --collapse it",
        has="which has its config",
    ),
    "safetensors": Format(
        _portable,
        "segment_length",
        "a directory of python -m xlformer.export --format=safetensors",
        has="which has config.json",
    ),
}


def _segment_length(hparams: dict, name: str) -> int:
    # A file may lack it, and 0 would be no segment.
    length = hparams.get(name) or DEFAULT_LENGTH
    if type(length) is not int:
        raise UserError(f"hparams: {name}={length!r:.50} is no whole number")
    return length


def _probe(args, overrides) -> None:
    """Scores a text, and warns when the loss exceeds the entropy of single symbols.

    A vocabulary in another order than the weights fits every shape: only the loss shows
    it.
    """
    if not args.probe and not any(o.startswith("data.") for o in overrides):
        print(
            "no probe: --probe=FILE or --config.data.corpus=NAME would check the order"
        )
        return
    card = evaluation.evaluate(args.workdir, text=args.probe, max_tokens=PROBE_TOKENS)
    print(f"probe: {card['nats_per_token']:.4f} nats per token of {card['corpus']}")
    if "warning" in card:
        print(f"warning: {card['warning']}", file=sys.stderr)


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.convert", description=__doc__)
    about = "; ".join(f"{name}: {found.about}" for name, found in FORMATS.items())
    parser.add_argument("--format", required=True, choices=list(FORMATS), help=about)
    for name, required, about in (
        ("--source", True, "weights; a directory of hf, nvidia or tf; PREFIX of tf"),
        ("--workdir", True, "new or empty"),
        ("--vocab", False, VOCAB_HELP),
        ("--hparams", False, "JSON of the original's arguments"),
        ("--probe", False, "a text file, scored at the end as a check"),
    ):
        parser.add_argument(name, required=required, type=command.place, help=about)
    parser.add_argument(
        "--collapse",
        action="store_true",
        help="of sha_rnn: one vector for the weights that make it, to read only",
    )
    args, overrides = parser.parse_with_overrides(argv)
    check_new(args.workdir)
    vocabulary = read_vocabulary(args.vocab) if args.vocab else None
    found = FORMATS[args.format]
    if args.hparams and found.has:
        raise UserError(
            f"--hparams={args.hparams} with --format={args.format}, {found.has}"
        )
    read = Read(*found.read(args.source, args.hparams))
    model_config, params = read.config, read.params
    own = read.vocabulary
    if vocabulary is None and own is not None:
        vocabulary = read_vocabulary(own) if isinstance(own, str) else own
        size = model_config.vocab_size
        if isinstance(own, str) and vocabulary.size != size:
            raise UserError(
                f"{own} has {vocabulary.size} symbols, the weights of {args.source} "
                f"have {size}: pass their own as --vocab"
            )
    if args.probe and is_read_once(args.probe):
        raise UserError(f"--probe={args.probe} is read twice, a pipe only once: a file")
    if args.probe and vocabulary is not None:
        # A text that cannot be encoded says so before anything is written.
        encode_file(vocabulary, args.probe)
    elif args.probe and not any(o.startswith("data.") for o in overrides):
        raise UserError(f"--probe={args.probe} needs --vocab=FILE to be encoded with")
    if args.collapse:
        model_config, params = sha_rnn.collapsed(model_config, params)
    adopt(
        model_config,
        params,
        args.workdir,
        vocabulary=vocabulary,
        segment_length=_segment_length(read.hparams, found.length),
        overrides=overrides,
        step=read.step,
        base=read.base,
    )
    if read.note:
        print(read.note)
    _probe(args, overrides)
    print(json.dumps({"workdir": args.workdir, "vocab_size": model_config.vocab_size}))
    return 0


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
