"""Raw corpus -> TFDS -> one token array per split: python -m xlformer.prepare.

    python -m xlformer.prepare --config=penn --manual_dir=DIR
    python -m xlformer.prepare --config=text --config.data.path='book/*.txt'

Batch size, segment length and host count play no part: one preparation serves all.
"""

from __future__ import annotations

import json
import sys

from xlformer import command, config
from xlformer.data.prepared import Prepared, encode_file, load
from xlformer.data.preparing import prepare

__all__ = ["Prepared", "encode_file", "load", "main", "prepare"]


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.prepare", description=__doc__)
    parser.add_argument("--config", required=True, help="a config's name or file")
    parser.add_argument(
        "--manual_dir", type=command.place, help="where archives lie that you fetched"
    )
    parser.add_argument(
        "--directory", type=command.place, help="where prepared corpora are kept"
    )
    args, overrides = parser.parse_with_overrides(argv)
    loaded = config.load(args.config, overrides)
    if args.manual_dir is not None:
        loaded.data.manual_dir = args.manual_dir
    prepared = prepare(loaded.data, directory=args.directory)
    print(json.dumps(prepared.card, indent=2))
    print(f"directory {prepared.directory}")
    print(f"vocabulary {prepared.vocabulary.size} {prepared.vocabulary.unit}")
    return 0


def main(argv=None) -> int:
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
