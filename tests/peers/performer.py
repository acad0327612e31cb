"""Worker: the attention operation of performer-pytorch (lucidrains, fc8b784).

Forms: eager-f32 or compile-f32 (torch.compile). Its causal form is what it has without
its CUDA kernel. What it imports and does not use here is changed in memory.
"""

from __future__ import annotations

import torch
import torch_side
import worker
from settings import Linear

FILE = torch_side.PEERS / "performer-pytorch/performer_pytorch/performer_pytorch.py"
PATCHES = {
    "from distutils.version import LooseVersion\n": "",
    "LooseVersion(torch.__version__) >= LooseVersion('1.8.0')": "True",
    "from local_attention import LocalAttention\n": "",
    "from axial_positional_embedding import AxialPositionalEmbedding\n": "",
    "from performer_pytorch.reversible import "
    "ReversibleSequence, SequentialSequence\n": "",
}


def build(setting: Linear, form: str):
    how, _, _ = form.partition("-")
    module = torch_side.module("performer_pytorch", FILE, PATCHES)
    attention = module.FastAttention(
        setting.d_head,
        nb_features=setting.n_features,
        causal=setting.causal,
        generalized_attention=setting.relu,
    )
    if how == "compile":
        attention = torch.compile(attention)
    shape = setting.batch_size, setting.n_head, setting.segment_length, setting.d_head
    arrays = [torch.randn(shape, requires_grad=setting.train) for _ in range(3)]

    def step():
        with torch.set_grad_enabled(setting.train):
            y = attention(*arrays)
            if setting.train:
                for x in arrays:
                    x.grad = None
                y.square().sum().backward()

    return torch_side.times(step, setting), torch_side.facts(attention)


if __name__ == "__main__":
    worker.serve(build)
