"""What the PyTorch programs have in common: loading, tokens, and the loops.

The loops do what the programs' own do, but for one thing, in their favour: they do not
fetch the loss to the host in every step.
"""

from __future__ import annotations

import itertools
import linecache
import math
import pathlib
import sys
import types
from collections.abc import Callable, Mapping

import torch
import worker
from settings import Setting, Step

PEERS = pathlib.Path(__file__).resolve().parents[2] / "peers"
CLIP = 0.25
RATE = 1e-4  # small: a GradScaler leaves out the optimizer where numbers overflow


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def module(name: str, path: pathlib.Path, patches: Mapping[str, str] | None = None):
    """Loads a file of a peer as module `name`; patches its text, in memory only."""
    if not path.exists():
        where = path.relative_to(PEERS.parent)
        raise SystemExit(f"{where} is not here: bash launch/gpu.sh --prepare")
    source = path.read_text(encoding="utf-8")
    for old, new in (patches or {}).items():
        if old not in source:
            raise SystemExit(f"{path} is another version: it has no {old!r}")
        source = source.replace(old, new)
    # TorchScript and torch.compile read the text of functions again. (Without a time
    # of change this entry stays.)
    lines = source.splitlines(keepends=True)
    linecache.cache[str(path)] = (len(source), None, lines, str(path))
    made = types.ModuleType(name)
    made.__file__ = str(path)
    sys.modules[name] = made
    # Its own text, without the __future__ of this file.
    exec(compile(source, str(path), "exec", dont_inherit=True), made.__dict__)
    return made


def batches(setting: Step) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets), time first as all programs have it."""
    pairs = worker.batches(setting)
    return [
        tuple(torch.from_numpy(x.T.copy()).long().to(device()) for x in pair)
        for pair in pairs
    ]


def randomize(model: torch.nn.Module) -> None:
    """Normal weights: zeros would draw less power, and a GPU clocks by power."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "layer_norm.weight" in name else 0.0
            parameter.normal_(mean, 0.02)


def fill(forward: Callable, setting: Setting, data):
    """The memory after enough segments to be full: from then on shapes are fixed."""
    mems = None
    with torch.no_grad():
        for k in range(math.ceil(setting.memory_length / setting.segment_length) + 1):
            _, mems = forward(*data[k % len(data)], mems)
    return mems


def training(forward, model, setting, *, mems, optimizer, dtype, scaler=None):
    """run(times) of training steps; forward(inputs, targets, mems) -> (loss, mems).

    Args:
      dtype: of autocast; None is without it.
      scaler: a torch.amp.GradScaler, or None.
    """
    data = itertools.cycle(batches(setting))
    parameters = list(model.parameters())

    def step():
        nonlocal mems
        inputs, targets = next(data)
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast(device().type, dtype, enabled=dtype is not None):
            loss, mems = forward(inputs, targets, mems)
            loss = loss.float().mean().type_as(loss)
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()

    return times(step, setting)


def scoring(forward, setting, *, mems):
    """run(times) of scored segments."""
    data = itertools.cycle(batches(setting))
    total = torch.zeros((), device=device())

    def step():
        nonlocal mems
        with torch.no_grad():
            loss, mems = forward(*next(data), mems)
            total.add_(loss.float().mean())

    return times(step, setting)


def times(step, setting):
    """run(times) of a step."""

    def run(times: int) -> int:
        for _ in range(times):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return times * setting.tokens

    return run


def facts(model: torch.nn.Module) -> dict:
    """What a result says about the program."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "versions": {"torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
