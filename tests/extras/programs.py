"""The programs of others, as they load what we write: python modules by name.

They lie in peers/, which git ignores (bash launch/gpu.sh --prepare fetches them at
fixed commits). What a current PyTorch refuses in them is changed in memory, as in
tests/peers, and so is what would round in float64.
"""

import contextlib
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
import torch

from xlformer import models
from xlformer.models.parameters import abstract_params

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "peers"))

import torch_side  # noqa: E402

PEERS = torch_side.PEERS
XL = PEERS / "transformer-xl/pytorch"
NVIDIA = PEERS / "DeepLearningExamples/PyTorch/LanguageModeling/Transformer-XL/pytorch"
AWD_LSTM, SHA_RNN = PEERS / "awd-lstm-lm", PEERS / "sha-rnn"
PATCHES = {
    "CUDA_MAJOR = int(torch.version.cuda.split('.')[0])": "",
    "CUDA_MINOR = int(torch.version.cuda.split('.')[1])": "",
    # masked_fill takes no masks of bytes any more.
    ".byte()[:": ".bool()[:",
    "attn_score.float().masked_fill": "attn_score.masked_fill",
    # -1 was 'none' when it was written, and now is the last word.
    "padding_idx = -1": "padding_idx = None",
    # What was a sum of bytes is an 'or' of booleans.
    "partial_mask = targets >= self.splits[idx]": (
        "partial_mask = (targets >= self.splits[idx]).long()"
    ),
    "entropy.float().sum()": "entropy.sum()",
    # apex needs CUDA.
    "from apex.normalization.fused_layer_norm import FusedLayerNorm as LayerNorm": (
        "LayerNorm = nn.LayerNorm"
    ),
    "(nn.Linear, nn.Embedding, nn.LayerNorm)": "(nn.Linear, nn.Embedding)",
    "query.float()": "query",
    "x.float()": "x",
    "dtype=torch.float)": "dtype=torch.get_default_dtype())",
}


@contextlib.contextmanager
def loaded(folder, *names, sub=""):
    """Modules of a program; of other tests' modules with these names nothing is left.

    sub: a folder beside them whose modules are imported by their names alone.
    """
    if not folder.is_dir():
        where = folder.relative_to(ROOT)
        pytest.skip(f"{where} is not here: bash launch/gpu.sh --prepare fetches it")
    path = list(sys.path)
    sys.path[:0] = [str(folder / sub), str(folder)]
    try:
        yield [_module(folder, name) for name in names]
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(str(PEERS)):
                del sys.modules[name]


def _module(folder, name):
    path = folder / f"{name.replace('.', '/')}.py"
    source = path.read_text(encoding="utf-8")
    patches = {old: new for old, new in PATCHES.items() if old in source}
    return torch_side.module(name.rpartition(".")[2], path, patches)


def package(name, folder):
    """A package without its __init__, which may want what is not installed."""
    made = types.ModuleType(name)
    made.__path__ = [str(folder)]
    made.__file__ = str(folder)
    sys.modules[name] = made


@contextlib.contextmanager
def precision(dtype):
    """What torch makes without being told."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def drawn(model, dtype, seed=3):
    """Random parameters of ours: norms near 1, all else near 0, none of them zero."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (mean + rng.normal(0.0, 0.3, x.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(model))


def text(vocab_size, lengths, rows, seed=5):
    """(inputs, targets) of segments that follow each other, [B, T] each."""
    rng = np.random.default_rng(seed)
    ids_BN = rng.integers(0, vocab_size, (rows, sum(lengths) + 1))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    pairs = zip(starts, ends, strict=True)
    return [(ids_BN[:, a:b], ids_BN[:, a + 1 : b + 1]) for a, b in pairs]


def ours(config, params, segments):
    """The nll of each segment, [B, T], in the precision of the parameters."""
    model = models.build(config)
    dtype = jax.tree.leaves(params)[0].dtype
    found = []
    with jax.enable_x64(dtype == np.float64):
        apply = jax.jit(model.apply)
        state = model.init_state(len(segments[0][0]), dtype)
        for inputs_BT, targets_BT in segments:
            nll_BT, state, _ = apply(params, inputs_BT, targets_BT, state)
            found.append(np.asarray(nll_BT))
    return found


def close(found, expected, dtype):
    """To 1e-12 in float64, 1e-5 in float32."""
    tolerance = {np.float64: 1e-12, np.float32: 1e-5}[np.dtype(dtype).type]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
