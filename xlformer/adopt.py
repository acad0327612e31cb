"""Makes a work directory of other programs' weights; the command behind convert.py."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
from etils import epath

from xlformer import command, convert, evaluate, models, prepare, runs, storage
from xlformer import config as config_lib
from xlformer.data import vocabulary as vocabularies
from xlformer.data.local import is_read_once
from xlformer.data.prepared import encode_file
from xlformer.data.vocabulary import (
    ByteVocabulary,
    CharVocabulary,
    Vocabulary,
    WordVocabulary,
)
from xlformer.errors import UserError
from xlformer.training.checkpoints import Checkpoints
from xlformer.weights import read_json, read_state

PROBE_TOKENS = 20_000
VOCAB_HELP = (
    "vocabulary.json, or a symbol a line: words with <eos>, byte values, or characters"
)


def adopt(
    model_config, params, workdir, *, vocabulary=None, hparams=None, overrides=()
):
    """Writes config.json, vocabulary.json and one checkpoint, of step 0, in float32.

    Args:
      model_config, params: of `convert.from_original` or `convert.from_hf`.
      workdir: new or empty.
      vocabulary: symbols in the order of the weights' ids; None leaves it to the data.
      hparams: the originals' settings, for the segment length of evaluation.
      overrides: 'a.b=v' of the written config, such as data.corpus=wikitext103.
    """
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    config = _config(model_config, params, hparams or {}, overrides)
    _check_size(config, vocabulary, model_config.vocab_size)
    workdir = _new_directory(workdir)
    with Checkpoints(workdir / runs.CHECKPOINTS) as checkpoints:
        checkpoints.save(0, {"params": params}, config=config_lib.to_dict(config))
    try:
        if vocabulary is not None:
            text = vocabulary.to_json()
            (workdir / runs.VOCABULARY).write_text(text, encoding="utf-8")
        text = config_lib.to_json(config)
        (workdir / runs.CONFIG).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written: {error}") from error


def _config(model_config, params, hparams, overrides):
    fields = dataclasses.asdict(model_config)
    config = config_lib.default_config("transformer_xl", **fields)
    config.name = "converted"
    config.data.corpus = "text"
    config.data.min_count = 1  # which words there are is said by the weights
    segment_length = max(hparams.get("tgt_len") or 64, 1)
    config.train.segment_length = config.eval.segment_length = segment_length
    for override in overrides:
        field, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--config.{field} needs a value: --config.{field}=VALUE")
        config_lib.set_field(config, field, text)
    expected = jax.eval_shape(models.build(config.model).init, jax.random.key(0))
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, expected):
        raise UserError(
            f"--config.model overrides ({', '.join(overrides)}) ask for another shape "
            "than the weights have"
        )
    return config


def _check_size(config, vocabulary, vocab_size) -> None:
    """Before anything is written."""
    name = "--vocab"
    if vocabulary is None:
        if not runs.names_data(config):
            return
        vocabulary, name = prepare.prepare(config.data).vocabulary, "the data"
    if vocabulary.size != vocab_size:
        raise UserError(
            f"{name} has {vocabulary.size} symbols, the weights have {vocab_size}"
        )


def _new_directory(workdir) -> epath.Path:
    workdir = storage.path(workdir)
    try:
        if workdir.exists() and any(workdir.iterdir()):
            raise UserError(f"--workdir={workdir} is not empty; name a new directory")
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: not a directory: {error}") from error
    return workdir


def read_vocabulary(path: str) -> Vocabulary:
    """Our JSON, or a text file with one symbol a line in the order of their ids.

    With `<eos>` among them the symbols are words. Different numbers below 256 are bytes
    (the original's enwik8), unless all of them are of one digit; all else are single
    characters.
    """
    if path.endswith(".json"):
        return vocabularies.load(path)
    try:
        symbols = pathlib.Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--vocab={path}: cannot be read: {error}") from error
    symbols = symbols[:-1] if symbols[-1] == "" else symbols
    counts = [0] * len(symbols)
    try:
        numbers = {str(value) for value in range(256)} >= set(symbols)
        if numbers and len(set(symbols)) == len(symbols) and max(map(len, symbols)) > 1:
            values = [int(s) for s in symbols]
            newline = "keep" if vocabularies.NEWLINE in values else "drop"
            return ByteVocabulary(values, counts, newline=newline)
        if "<eos>" in symbols:
            return WordVocabulary(symbols, counts)
        return CharVocabulary(symbols, counts)
    except ValueError as error:
        raise UserError(
            f"--vocab={path}: not a list of symbols: {error}; a line each: words with "
            "<eos> among them, byte values (0 to 255), or single characters"
        ) from error


def _read(args):
    if args.format == "hf":
        config, params = convert.from_hf(args.source)
        return config, params, read_json(pathlib.Path(args.source) / "config.json")
    state, hparams = read_state(args.source)
    if args.hparams:
        hparams = read_json(pathlib.Path(args.hparams))
    if hparams is None:
        beside = pathlib.Path(args.source).with_name("hparams.json")
        if not beside.is_file():
            raise UserError(
                f"{args.source} carries no hparams: pass --hparams=FILE.json with the "
                f"original's arguments, or put {beside.name} beside it"
            )
        hparams = read_json(beside)
    return (*convert.from_original(state, hparams), hparams)


def _probe(args, overrides) -> None:
    """Warns when the loss exceeds the unigram entropy."""
    if not args.probe and not any(o.startswith("data.") for o in overrides):
        print(
            "no probe: --probe=FILE or --config.data.corpus=NAME would check the order"
        )
        return
    card = evaluate.evaluate(args.workdir, text=args.probe, max_tokens=PROBE_TOKENS)
    print(f"probe: {card['nats_per_token']:.4f} nats per token of {card['corpus']}")
    if "warning" in card:
        print(f"warning: {card['warning']}", file=sys.stderr)


def _main(argv) -> int:
    parser = command.Parser(
        prog="python -m xlformer.convert", description=convert.__doc__
    )
    parser.add_argument("--format", required=True, choices=["original", "hf"])
    for name, required, about in (
        ("--source", True, "weights, or an hf directory"),
        ("--workdir", True, "new or empty"),
        ("--vocab", False, VOCAB_HELP),
        ("--hparams", False, "JSON of the original's arguments"),
        ("--probe", False, "a text file, scored at the end as a check"),
    ):
        parser.add_argument(name, required=required, type=command.place, help=about)
    args, overrides = parser.parse_with_overrides(argv)
    vocabulary = read_vocabulary(args.vocab) if args.vocab else None
    if args.probe and is_read_once(args.probe):
        raise UserError(f"--probe={args.probe} is read twice, a pipe only once: a file")
    if args.probe and vocabulary is not None:
        encode_file(vocabulary, args.probe)  # Before anything is written.
    elif args.probe and not any(o.startswith("data.") for o in overrides):
        raise UserError(f"--probe={args.probe} needs --vocab=FILE to be encoded with")
    model_config, params, hparams = _read(args)
    adopt(
        model_config,
        params,
        args.workdir,
        vocabulary=vocabulary,
        hparams=hparams,
        overrides=overrides,
    )
    _probe(args, overrides)
    print(json.dumps({"workdir": args.workdir, "vocab_size": model_config.vocab_size}))
    return 0


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)
