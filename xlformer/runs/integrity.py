"""One saved step: sealing it with digests, reading it back only if they agree.

Orbax 0.12.8 restores a flipped bit in an array of floats without a word: in 48 of 48
tries, 12 in each of four formats. Hence the seal: a JSON item with a digest, shape and
dtype for each leaf, the metric, and checksums of the config and of the seal itself. It
detects accidents; whoever can forge a checkpoint can forge its seal too.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from xlformer import strangers
from xlformer.errors import UserError
from xlformer.runs import leaves

_log = logging.getLogger(__name__)


class Corrupt(Exception):
    """This step cannot be trusted; another one may be."""


CARRIED = "carried/"  # the part of a training state that is the model's own state
# Floats that may be turned into each other there: the dtype of the computation differs
# between machines ('auto'), and a run goes on all the same. Nothing else is cast.
FLOATS = {"bfloat16", "float32", "float64"}
FORMAT = 2  # of a seal; 0.1.0 wrote none, and called nats per token "bpc"


def seal(tree, *, config: Mapping, metric: Mapping) -> tuple[dict, dict]:
    """Returns (the nested dict of arrays to write, its seal)."""
    # Digests of what lies on the devices, before Orbax copies and writes it: whatever
    # happens to it on the way shows when it is read.
    flat = leaves.flatten(tree)
    arrays = leaves.to_disk(flat)
    item = {
        "format": FORMAT,
        "leaves": leaves.digests(arrays),
        "layouts": leaves.layouts(tree),
        "config": _crc(config),
        "metric": dict(metric),  # {name: value} or {}
    }
    return leaves.nest(arrays), item | {"checksum": _crc(item)}


def read_seal(directory: epath.Path) -> dict:
    if endless := strangers.endless(directory.parent, [directory.name]):
        name = os.path.relpath(endless, directory)
        raise Corrupt(f"{name} is {strangers.ENDLESS}")
    item = _read_json(directory / "digest")
    try:
        checksum = item.pop("checksum")
        intact = checksum == _crc(item)
    except Exception as error:
        raise Corrupt(f"the digest is unreadable ({cause(error)})") from error
    if not intact:
        raise Corrupt("the digest does not match its own checksum")
    written = item.pop("format", 1)
    # A newer format is no damage, for which an older step would be taken instead.
    if type(written) is int and written > FORMAT:
        raise UserError(
            f"{directory}: the checkpoint has format {written}, this xlformer reads 1 "
            f"to {FORMAT}: use the release that wrote it, or a newer one"
        )
    # A checksum does not say who made it, so the types that the code below relies on
    # are checked as well.
    kinds = {"leaves": dict, "layouts": dict, "metric": dict, "config": int}
    for name, kind in kinds.items():
        if not isinstance(item.get(name), kind):
            raise Corrupt(f"the digest has no {name}")
    metric = item["metric"]
    if any(type(x) is not float for x in metric.values()):
        raise Corrupt("the digest has a metric that is no number")
    if written == 1 and "bpc" in metric:
        metric["nats_per_token"] = metric.pop("bpc")
    return item


def read_config(directory: epath.Path, sealed: Mapping) -> dict:
    config = _read_json(directory / "config")
    if _crc(config) != sealed["config"]:
        raise Corrupt("the config does not match its checksum")
    return config


def read_state(directory: epath.Path, sealed: Mapping, abstract, *, whole: bool):
    """Reads the leaves of `abstract`, which with whole=False may be a part of them.

    A leaf with a sharding becomes a jax.Array, one without a numpy array. What a model
    carries is in the dtype that its machine computed in; it is turned into the one that
    is wanted here. Raises Corrupt for damage and UserError for a checkpoint of
    something else.
    """
    target = leaves.flatten(abstract)
    wanted = _as_stored(directory, target, sealed["layouts"])
    _check_layouts(directory, wanted, sealed["layouts"])
    extra = sorted(set(sealed["layouts"]) - set(wanted)) if whole else []
    if extra:
        # Adam's moments, say, after a change to sgd: to drop them would go unnoticed.
        raise UserError(
            f"{directory}: the checkpoint has {extra[0]} ({len(extra)} in all), which "
            "this config has not: the model or the optimizer is not the one it had"
        )
    stored = leaves.to_disk(wanted)
    try:
        values = leaves.flatten(_read_arrays(directory, leaves.nest(stored)))
        sums = leaves.digests(values)
    except Exception as error:
        _refuse_forbidden(directory, error)
        raise Corrupt(f"state: {cause(error)}") from error
    # The digests are of what was stored, so they are compared before anything is cast.
    for path in stored:
        if sums[path] != sealed["leaves"].get(path):
            raise Corrupt(f"state: {path} does not match its digest")
    restored = [
        leaves.cast(leaves.from_disk(values.get(k), x), target[k])
        for k, x in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), restored)


def _as_stored(directory, wanted: Mapping, stored: Mapping) -> dict:
    """`wanted` with floats of the carried state in the dtype of the checkpoint."""
    found = {}
    for path, x in wanted.items():
        dtype = str(stored.get(path, "")).partition("[")[0]
        known = path.startswith(CARRIED) and {dtype, str(x.dtype)} <= FLOATS
        if known and dtype == "float64" and not jax.config.jax_enable_x64:
            raise UserError(
                f"{directory}: {path} is {dtype}, which JAX reads only with "
                "JAX_ENABLE_X64=1 in the environment"
            )
        if known and dtype != str(x.dtype):
            _log.warning(
                "%s was %s when it was saved, here it is %s", path, dtype, x.dtype
            )
            x = jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding)
        found[path] = x
    return found


def _check_layouts(directory, wanted, stored) -> None:
    for path, x in wanted.items():
        here = leaves.layout(x)
        if stored.get(path) != here:
            raise UserError(
                f"{directory}: the checkpoint has {path} as "
                f"{stored.get(path, 'nothing')}, here it is {here}: the config of the "
                "model or the optimizer is not the one it was saved with"
            )


def _read_arrays(directory, abstract):
    if not abstract:
        return {}
    # Not StandardRestore, which refuses a part of a tree as a structure mismatch; this
    # handler with partial_restore reads a part as well as the whole.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(
            directory / "state",
            args=ocp.args.PyTreeRestore(
                abstract,
                restore_args=jax.tree.map(_restore_args, abstract),
                partial_restore=True,
            ),
        )


def _restore_args(x):
    if x.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype)
    return ocp.ArrayRestoreArgs(
        sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
    )


def _read_json(path: epath.Path):
    try:
        found = ocp.JsonCheckpointHandler().restore(path)
        strangers.check_depth(found)
        return found
    except Exception as error:  # JSONDecodeError, FileNotFoundError, and others
        _refuse_forbidden(path, error)
        raise Corrupt(f"{path.name}: {cause(error)}") from error


def _refuse_forbidden(path: epath.Path, error: Exception) -> None:
    """What another user's rights hide is not damaged: no older step is taken for it.

    tensorstore says so in a ValueError.
    """
    if isinstance(error, PermissionError) or "Permission denied" in str(error):
        raise UserError(f"{path} cannot be read: {cause(error)}") from error


def _crc(item) -> int:
    # With sorted keys, because their order may change on the way through a file.
    return zlib.crc32(json.dumps(item, sort_keys=True).encode())


def cause(error: Exception) -> str:
    """The type and the ends of a message that may be pages long.

    tensorstore names the cause last, behind its paths; then come notes in brackets.
    """
    text = re.split(r" \[\w+='", " ".join(str(error).split()))[0]
    if len(text) > 200:
        text = f"{text[:80]} ... {text[-115:]}"
    return f"{type(error).__name__}: {text}"
