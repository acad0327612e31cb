"""SHA-RNN's weights: to and fro, collapsed, by the command, and what is refused."""

import json

import golden_weights
import numpy as np
import pytest
from golden_weights import changed

from xlformer import convert, evaluate, models, runs
from xlformer.convert import __main__ as command
from xlformer.errors import UserError

GOLDEN, _ = golden_weights.read("sha_rnn.npz")
V, D = 50, 16


def attending(*blocks):
    """The golden state with the attention of its block 2 in these blocks."""
    found = {n: x for n, x in GOLDEN.items() if ".attn." not in n}
    for name in GOLDEN.keys() - found.keys():
        found |= {name.replace("2", str(k), 1): GOLDEN[name] for k in blocks}
    return found


def collapsed(state):
    """As vq_collapse leaves it."""
    return {n: x for n, x in state.items() if ".vq." not in n}


@pytest.mark.parametrize(
    ("state", "attention"),
    [
        (GOLDEN, "second_last"),
        (attending(0, 1, 2, 3), "all"),
        (attending(), "none"),
        (collapsed(GOLDEN), "second_last"),
    ],
)
def test_there_and_back_is_the_same_state(state, attention):
    config, params = convert.from_sha_rnn(state, {"dropouth": 0.25, "bptt": 7})
    assert (config.vocab_size, config.n_layer, config.chunks) == (V, 4, 4)
    assert (config.attention, config.hidden_dropout) == (attention, 0.25)
    assert config.memory_length == (0 if attention == "none" else 5000)
    back = convert.to_sha_rnn(config, params)
    assert back.keys() == state.keys()
    for name, x in state.items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)
        assert back[name].dtype == x.dtype


def test_the_command_writes_either_form_and_both_score_alike(tmp_path, capsys):
    symbols = [chr(ord("0") + i) for i in range(V)]
    (tmp_path / "vocab.txt").write_text("\n".join(symbols) + "\n")
    text = "".join(np.random.default_rng(0).choice(symbols, 83))
    (tmp_path / "text.txt").write_text(text)
    np.savez(tmp_path / "w.npz", **GOLDEN)
    (tmp_path / "hparams.json").write_text(json.dumps({"bptt": 11, "nhid": 64}))
    vocabulary = f"--vocab={tmp_path / 'vocab.txt'}"
    small = "--config.model.memory_length=29"  # 5,000 would only take time
    flags = [vocabulary, f"--probe={tmp_path / 'text.txt'}", small]
    source = ["--format=sha_rnn", f"--source={tmp_path / 'w.npz'}"]
    assert command.main([*source, *flags, f"--workdir={tmp_path / 'run'}"]) == 0
    # The vocabulary is that of the run.
    again = ["--format=xlformer", f"--source={tmp_path / 'run'}"]
    assert command.main([*again, "--collapse", f"--workdir={tmp_path / 'small'}"]) == 0
    found, smaller = (runs.load(tmp_path / name) for name in ("run", "small"))
    assert found.config.eval.segment_length == 11 and smaller.model.config.collapsed
    assert smaller.config.train.segment_length == 11
    state = convert.to_sha_rnn(smaller.model.config, smaller.params)
    assert state.keys() == collapsed(GOLDEN).keys()
    nats = [
        evaluate.evaluate(
            tmp_path / name, text=str(tmp_path / "text.txt"), max_tokens=41
        )["nats"]
        for name in ("run", "small")
    ]
    assert nats[0] == pytest.approx(nats[1], rel=1e-6)
    capsys.readouterr()
    long = [f"--workdir={tmp_path / 'run'}", "--segment_length=31"]
    assert evaluate.main([*long, f"--text={tmp_path / 'text.txt'}"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: --segment_length=31 ")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("state", "hparams", "line"),
    [
        ({"decoder__bias": None}, {}, "the state dict lacks 'decoder.bias'"),
        ({"blocks__0__ff__linear1__weight": None}, {}, "lacks 'blocks.0.ff.linear1.w"),
        ({"blocks__3__lnout__bias": None}, {}, "lacks 'blocks.3.lnout.bias'"),
        ({"blocks__2__attn__vq__l1__bias": None}, {}, "lacks 'blocks.2.attn.vq.l1.bi"),
        ({"encoder__weight": np.ones(3)}, {}, "encoder.weight has shape .3,., expec"),
        ({"blocks__2__attn__qs": np.ones(3)}, {}, "blocks.2.attn.qs has shape .3,., "),
        ({"decoder__bias": np.ones(V, int)}, {}, "decoder.bias holds int64, expected"),
        ({"pos_emb": np.ones(3)}, {}, "the state dict has unexpected names: pos_emb"),
        ({"blocks__0__attn__qs": np.ones(3)}, {}, "blocks 0, 2 of 4 have attention: "),
        ({f"blocks__{'9' * 9}__x__y": np.ones(3)}, {}, "blocks 2 of 5 have attention"),
        ({f"blocks__{'9' * 5000}__x__y": np.ones(3)}, {}, "unexpected names: blocks"),
        ({"decoder__weight": np.ones((V, D))}, {}, "decoder.weight differs from enc"),
        ({}, {"nhid": 65}, "hparams: nhid=65, the state has 64"),
        ({}, {"dropout": "x"}, "config.model.dropout='x' is not of type float"),
        ({}, {"max_positions": 0}, "memory_length=0 with config.model.attention="),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(state, hparams, line):
    with pytest.raises(UserError, match=line) as raised:
        convert.from_sha_rnn(changed(GOLDEN, **state), hparams)
    assert "\n" not in str(raised.value)


def test_only_what_has_such_a_vector_collapses():
    config, params = convert.from_sha_rnn(attending())
    with pytest.raises(UserError, match="there is nothing to collapse"):
        command.sha_rnn.collapsed(config, params)
    with pytest.raises(UserError, match="collapse: 'lstm' has nothing to collapse"):
        command.sha_rnn.collapsed(models.LSTMConfig(), params)
