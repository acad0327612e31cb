"""Worker: NVIDIA's PyTorch Transformer-XL (DeepLearningExamples, 729963d).

Forms: eager, compile (torch.compile), and for scoring torchscript, as its eval.py makes
it. Training is mixed precision as in its train.py: fp16 autocast, a gradient scaler,
its LAMB; scoring is all in fp16. On a CPU (only for rehearsals): bfloat16, no scaler.
"""

from __future__ import annotations

import sys
import types

import original
import torch
import torch_side
import worker
from settings import Setting

FOLDER = (
    torch_side.PEERS
    / "DeepLearningExamples/PyTorch/LanguageModeling/Transformer-XL/pytorch"
)


def build(setting: Setting, form: str):
    gpu = torch_side.device().type == "cuda"
    half = torch.float16 if gpu else torch.bfloat16
    library = load(scripted=form == "torchscript")
    dtype = None if setting.train else half
    model = library.MemTransformerLM(**original.arguments(setting), dtype=dtype)
    model.to(torch_side.device()).train(setting.train)
    torch_side.randomize(model)
    if not setting.train:
        model.to(half)
    called = model
    if form == "torchscript":
        called = scripted(model)
    elif form == "compile":
        called = torch.compile(model)
    with torch.autocast(torch_side.device().type, half, enabled=setting.train):
        memory = torch_side.fill(model, setting, torch_side.batches(setting))
    if setting.train:
        run = torch_side.training(
            called,
            model,
            setting,
            mems=memory,
            optimizer=lamb(model),
            dtype=half,
            scaler=torch.amp.GradScaler() if gpu else None,
        )
    else:
        run = torch_side.scoring(called, setting, mems=memory)
    return run, torch_side.facts(model)


def load(*, scripted: bool):
    """Its mem_transformer.py, or the one that it makes TorchScript of."""
    sys.path.insert(0, str(FOLDER))
    # The package's __init__ wants dllogger and pynvml, which its models do not use.
    utils = types.ModuleType("utils")
    utils.__path__ = [str(FOLDER / "utils")]
    sys.modules["utils"] = utils
    if not scripted:
        return torch_side.module("mem_transformer", FOLDER / "mem_transformer.py")
    # It names the device in its text.
    here = {"torch.device('cuda')": f"torch.device('{torch_side.device().type}')"}
    for name in ("proj_adaptive_softmax_jit", "mem_transformer_jit"):
        path = FOLDER / f"inference/{name}.py"
        made = torch_side.module(f"inference.{name}", path, here)
    return made


def scripted(model):
    """As its eval.py does, with random numbers where that loads a checkpoint's."""
    dtype = next(model.parameters()).dtype
    for tensors in (model.crit.out_projs, model.crit.out_layers_biases):
        for k, tensor in enumerate(tensors):
            if tensor is not None:
                tensors[k] = torch.randn_like(tensor, dtype=dtype).mul_(0.02).detach()
    weights = model.crit.out_layers_weights
    for k, weight in enumerate(weights):
        weights[k] = weight.detach()
    # As at the end of its eval.py.
    torch._C._jit_set_profiling_executor(False)
    torch._C._jit_set_profiling_mode(False)
    return torch.jit.script(model)


def lamb(model):
    """The optimizer of its yaml files, 'jitlamb'."""
    library = torch_side.module("lamb", FOLDER / "lamb.py")
    return library.JITLamb(model.parameters(), lr=torch_side.RATE)


if __name__ == "__main__":
    worker.serve(build)
