"""Worker: the PyTorch program of SHA-RNN (Smerity/sha-rnn, 218d748).

Forms: eager-f32 or compile-f32 (torch.compile and the fused Adam). Three lines are
changed in memory: an ordinary norm for apex's fused one, which needs CUDA, the rule of
initialisation, which would take that for one of its own, and its constant of positions.
Its optimizer is a package of its own; Adam is what both sides run here.
"""

from __future__ import annotations

import sys

import torch
import torch_side
import worker
from settings import SingleHead

FOLDER = torch_side.PEERS / "sha-rnn"
APEX = "from apex.normalization.fused_layer_norm import FusedLayerNorm as LayerNorm"
PATCHES = {
    APEX: "LayerNorm = nn.LayerNorm",
    "(nn.Linear, nn.Embedding, nn.LayerNorm)": "(nn.Linear, nn.Embedding)",
}


def build(setting: SingleHead, form: str):
    how, _, _ = form.partition("-")
    sys.path[:0] = [str(FOLDER)]
    length = {
        "num_max_positions = 5000": f"num_max_positions = {setting.memory_length}"
    }
    module = torch_side.module("model", FOLDER / "model.py", PATCHES | length)
    losses = torch_side.module("splitcross", FOLDER / "splitcross.py")
    rates = {"dropouth": setting.dropout, "dropouti": setting.dropout}
    model = module.SHARNN(
        "LSTM",
        setting.vocab_size,
        setting.d_model,
        setting.d_inner,
        setting.n_layer,
        setting.dropout,
        **rates,
        tie_weights=True,
    )
    criterion = losses.SplitCrossEntropyLoss(setting.d_model, splits=[])
    model.to(torch_side.device()).train(setting.train)
    criterion.to(torch_side.device())
    compiled = how == "compile"
    forward = caller(torch.compile(model) if compiled else model, criterion, model)
    options = {"lr": torch_side.RATE, "fused": compiled or None}
    optimizer = torch.optim.Adam(model.parameters(), **options)
    mems = torch_side.fill(forward, setting, torch_side.batches(setting))
    options = {"mems": mems, "optimizer": optimizer, "dtype": None}
    run = torch_side.training(forward, model, setting, **options)
    return run, torch_side.facts(model)


def caller(model, criterion, plain):
    """forward(inputs, targets, state) -> (loss, state), as the loop of its main.py."""
    decoder = plain.decoder

    def forward(inputs, targets, state):
        hidden, mems = state or (None, None)
        output, hidden, mems, *_ = model(inputs, hidden, mems=mems)
        loss = criterion(decoder.weight, decoder.bias, output, targets.reshape(-1))
        hidden = [tuple(x.detach() for x in pair) for pair in hidden]
        # Blocks without attention have an empty list.
        mems = [x if isinstance(x, list) else x.detach() for x in mems]
        return loss, (hidden, mems)

    return forward


if __name__ == "__main__":
    worker.serve(build)
