"""Plans a run for a machine that is not here: python -m xlformer.plan --config=NAME
--topology=v5p:4x4x4.

Compiles the training step with the compiler of that machine, where it is installed
(pip install 'xlformer[tpu]' or 'xlformer[cuda12]'), and reads from the program what it
will take: memory, FLOPs, traffic. Elsewhere, and with --arithmetic, it is arithmetic,
and says so. The schedule is priced at an assumed MFU. Exit code 1 if the memory is too
small. No data is needed.
"""

from __future__ import annotations

import json
import os
import sys

import jax
from etils import epath

from xlformer import command, sharding
from xlformer import config as config_lib
from xlformer.errors import UserError
from xlformer.machines import cores, rehearsal, topologies
from xlformer.machines.plan_text import render
from xlformer.machines.planning import HERE, plan


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.plan", description=__doc__)
    parser.add_argument("--config", required=True, help="NAME[:args] or FILE.py[:args]")
    parser.add_argument("--topology", required=True, help=topologies.KNOWN)
    parser.add_argument("--mesh", help=sharding.MESH_HELP)
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed")
    parser.add_argument("--price_per_chip_hour", type=float)
    parser.add_argument("--arithmetic", action="store_true", help="do not compile")
    parser.add_argument(
        "--parameters", action="store_true", help="list how each of them is split"
    )
    parser.add_argument(
        "--json", type=command.place, help="a file for the same in numbers"
    )
    args, overrides = parser.parse_with_overrides(argv)
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu={args.mfu} must be above 0 and at most 1")
    if args.price_per_chip_hour is not None and not args.price_per_chip_hour >= 0:
        raise UserError(
            f"--price_per_chip_hour={args.price_per_chip_hour} must not be negative"
        )
    if args.topology != HERE:
        # No TPU is looked for, neither here nor, by libtpu, on a metadata server, which
        # a machine outside of Google's cloud does not have.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        jax.config.update("jax_platforms", "cpu")
    config = config_lib.load(args.config, overrides)
    config.model.vocab_size = rehearsal.vocab_size(args.config, config)
    sizes = sharding.parse_mesh(args.mesh) if args.mesh else None
    if args.topology == HERE:
        cores.prepare_training(config, asked=None, sizes=sizes or config.mesh)
    found = plan(
        config,
        args.topology,
        sizes=sizes,
        mfu=args.mfu,
        price_per_chip_hour=args.price_per_chip_hour,
        arithmetic=args.arithmetic,
    )
    print(render(found, parameters=args.parameters))
    if args.json:
        epath.Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    # Not known is not too small.
    return 1 if found["memory"]["fits"] is False else 0


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
