"""Softmax weights read by FAVOR+: what is counted, what is trained, what is refused."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import trained_run

from xlformer import compare, models
from xlformer import config as config_lib
from xlformer.errors import UserError
from xlformer.hosts.faults import NotFinite
from xlformer.instruments import members, readings, transfer, transfer_runs
from xlformer.instruments.members import Member
from xlformer.runs.locks import InUse
from xlformer.training import objectives

T = 5
SIZES = dataclasses.replace(transfer_runs.TINY, steps=4, points=2)
TOKENS = np.random.default_rng(0).integers(12, size=103)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What the smallest form wrote."""
    out = tmp_path_factory.mktemp("transfer")
    assert compare.main(["transfer:tiny", f"--out={out}"]) == 0
    assert "<svg" in (out / "transfer.svg").read_text()
    return json.loads((out / "transfer.json").read_text())


def member(causal=True, workdir="runs/softmax", **fields):
    """A run of a small Performer that was never trained."""
    config = config_lib.load(f"performer_small:mechanism=softmax,causal={causal},debug")
    config.train.segment_length = T
    config.model.update(n_layer=1, vocab_size=13)
    config.unlock()
    for name, value in fields.items():
        config.model[name] = value
    config.data.corpus = "text" if workdir == "converted" else "stdlib"
    model = models.build(config.model)
    # So large that what is said is not the same everywhere.
    params = trained_run.random_params(model)
    params = jax.tree.map(lambda x: np.float32(0.3) * x, params)
    run = types.SimpleNamespace(
        config=config,
        model=model,
        params=params,
        workdir=workdir,
        step=7,
        mean_of=(),
        checkpoint="7",
    )
    return Member("own", run)


def one_by_one(source, objective):
    """Hits, nats and how many count, of one segment after the other."""
    model, found = source.model, []
    score, say = jax.jit(model.apply), jax.jit(model.log_probs)
    key = jax.random.key(objectives.EVALUATION_SEED)
    for begin in range(0, len(TOKENS) - T, T):
        places = np.arange(begin, begin + T)[None]
        asked = TOKENS[places], TOKENS[places + 1], key, places
        inputs, targets, weights = objective.examples(*asked)
        weights = np.ones((1, T)) if weights is None else np.asarray(weights)
        state = model.init_state(1)
        nll, *_ = score(source.params, inputs, targets, state)
        log_p, _ = say(source.params, inputs, state)
        hits = np.asarray(log_p).argmax(-1) == np.asarray(targets)
        found.append([(hits * weights).sum(), (nll * weights).sum(), weights.sum()])
    return np.sum(found, 0)


@pytest.mark.parametrize("causal", [True, False], ids=["next", "hidden"])
def test_a_text_is_read_segment_by_segment(causal):
    source = member(causal)
    objective = objectives.build(source.run.config.train, source.model)
    arguments = source.model, source.params, objective, TOKENS, T
    (found,) = readings.read(*arguments)
    hits, nats, count = one_by_one(source, objective)
    assert 0 < hits < count == found.targets
    assert found.accuracy == pytest.approx(hits / count)
    assert found.nats == pytest.approx(nats / count, rel=1e-5)
    assert found.targets == 100 if causal else 5 < found.targets < 30


def test_a_step_says_what_is_drawn():
    source = member()
    model = readings.model_of(source.model, redraw_interval=2)
    arguments = source.params, objectives.NextToken(), TOKENS, T
    found = [one.nats for one in readings.read(model, *arguments, range(4))]
    assert found[0] == found[1] != found[2] == found[3]


def test_who_always_says_the_most_frequent_symbol():
    assert readings.most_frequent(np.array([3, 1, 3, 0, 3])) == 0.6


@pytest.fixture
def trained(monkeypatch):
    """Configs that would be trained, by name; the source is not there to be read."""
    found = {}

    def fake(name, config, folder, model=None):
        config_lib.check(config)
        found[name] = config
        return name

    def with_model(config, name, workdir, overrides):
        config = config_lib.ConfigDict(config.to_dict())
        config.init_from = name
        config_lib.set_fields(config, overrides)
        return config

    monkeypatch.setattr(members, "trained", fake)
    monkeypatch.setattr(transfer_runs.start, "with_model", with_model)
    return found


@pytest.mark.parametrize("causal", [True, False])
def test_what_goes_on_from_the_weights(causal, trained, tmp_path):
    request = types.SimpleNamespace(runs=tmp_path)
    source = member(causal)
    for kind in (*transfer_runs.CONTINUED, transfer_runs.FRESH):
        transfer_runs.continued(request, source, SIZES, kind, 4)
    assert len(trained) == 6
    for name, config in trained.items():
        assert config.train.steps == 4 and config.train.save_every == 2
        fresh = "from_the_start" in name
        assert config.init_from == ("" if fresh else "runs/softmax:7")
        assert config.model.causal == causal
    assert trained["softmax-4"].model.mechanism == "softmax"
    one, redrawn = trained["positive-one_draw-4"], trained["SMREG-redrawn-4"]
    assert (one.model.features, one.model.redraw_interval) == ("positive", 0)
    assert (redrawn.model.features, redrawn.model.redraw_interval) == ("regularised", 2)
    assert not redrawn.model.carry_sums


def test_linformer_begins_from_the_start(trained, tmp_path):
    request = types.SimpleNamespace(runs=tmp_path)
    transfer_runs.continued(request, member(False), SIZES, "linformer", 6)
    config = trained["linformer-6"]
    assert (config.init_from, config.model.mechanism) == ("", "linformer")
    assert config.model.context_length == T
    with pytest.raises(UserError, match="later tokens too"):
        transfer_runs.continued(request, member(True), SIZES, "linformer", 6)


@pytest.fixture
def stored(monkeypatch):
    """Every run is its source, at steps 2 and 4."""
    checkpoints = types.SimpleNamespace(steps=lambda: [2, 4])
    monkeypatch.setattr(transfer, "Checkpoints", lambda *_, **__: checkpoints)
    monkeypatch.setattr(members, "text", lambda *_: (TOKENS, None, {"bytes": 103}))
    monkeypatch.setattr(
        members.runs, "load", lambda workdir, checkpoint: stored_sources[0].run
    )


stored_sources = []


def test_where_all_say_hidden_symbols(stored, monkeypatch):
    source = member(causal=False)
    source.run.workdir = types.SimpleNamespace()
    monkeypatch.setattr(type(source), "facts", lambda self: {})
    monkeypatch.setattr(source.run, "workdir", Place())
    monkeypatch.setattr(transfer_runs, "continued", continued := Continued(source))
    stored_sources[:] = [source]
    read, steps = readings.read, []

    def noted(*arguments):
        steps.append(arguments[5] if len(arguments) > 5 else None)
        return read(*arguments)

    monkeypatch.setattr(readings, "read", noted)
    study = transfer._study(None, source, SIZES, ("softmax", "SMREG, redrawn"))
    # A checkpoint is read by the draw that its last step was trained with.
    assert steps[-4:] == [[1], [3]] * 2
    assert continued.asked[-1] == ("linformer", SIZES.source_steps)
    assert list(study["curves"]["softmax"]) == [0, 2, 4]
    # It diverged: what is known is shown, with the reason.
    assert list(study["curves"]["SMREG, redrawn"]) == [0]
    assert "SMREG, redrawn: the loss is not finite" in study["notes"]
    start = study["from_the_start"]
    assert start["softmax"] == start["linformer"] and list(start["linformer"]) == [2, 4]
    titles = [table.title for table in transfer._tables(study)]
    assert titles[-1] == "accuracy from the start, by step: hidden symbols"


@pytest.mark.parametrize("kind", ["positive, from the start", "linformer"])
def test_what_begins_from_the_start_may_diverge_too(kind, stored, monkeypatch):
    source = member(causal=False)
    monkeypatch.setattr(type(source), "facts", lambda self: {})
    monkeypatch.setattr(source.run, "workdir", Place())
    monkeypatch.setattr(readings, "at_first", lambda *_, **__: [])
    score = types.SimpleNamespace(accuracy=0.5)
    monkeypatch.setattr(readings, "read", lambda *_: [score])
    monkeypatch.setattr(transfer_runs, "continued", Continued(source, diverges=kind))
    stored_sources[:] = [source]
    study = transfer._study(None, source, SIZES, ("softmax", transfer_runs.FRESH))
    assert f"{kind}: the loss is not finite" in study["notes"]
    found = study["curves"] | study["from_the_start"]
    assert [name for name, curve in found.items() if not curve] == [kind]
    rows = [row for table in transfer._tables(study) for row in table.rows]
    (shown,) = [row for row in rows if row[0] == kind]
    assert set(shown[1:]) == {None}


def test_what_is_no_loss_ends_the_study(stored, monkeypatch):
    source = member()
    monkeypatch.setattr(readings, "at_first", lambda *_, **__: [])
    score = types.SimpleNamespace(accuracy=0.5)
    monkeypatch.setattr(readings, "read", lambda *_: [score])
    for error in (InUse("X is in use"), UserError("X: cannot be written: full")):

        def continued(*_, error=error):
            raise error

        monkeypatch.setattr(transfer_runs, "continued", continued)
        with pytest.raises(type(error)) as raised:
            transfer._study(None, source, SIZES, ("SMREG, redrawn",))
        assert raised.value is error


class Place:
    def __truediv__(self, name):
        return name


class Continued:
    def __init__(self, source, diverges="SMREG, redrawn"):
        self.source, self.diverges, self.asked = source, diverges, []

    def __call__(self, request, source, sizes, kind, steps):
        self.asked.append((kind, steps))
        if kind == self.diverges:
            raise NotFinite("the loss is not finite")
        return self.source


def test_the_smallest_form(tiny):
    (study,) = tiny["studies"]
    first = {one["reading"]: one for one in study["at_first"]}
    assert list(first) == ["softmax", "positive"]
    assert first["positive"]["draws"] == 2 and first["softmax"]["targets"] == 196
    assert all(0 <= one["accuracy"] <= 1 for one in first.values())
    (curve,) = study["curves"].values()
    assert list(curve) == ["0", "1", "2", "3"]
    assert study["causal"] and not study["from_the_start"]
    assert any("cannot say the next one" in note for note in tiny["notes"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([member(), member(workdir="b")], "workdir='b': one run is read"),
        ([member(mechanism="lsh")], "its attention is not softmax"),
        (
            [member(mechanism="favor", redraw_interval=2)],
            "its attention is not softmax",
        ),
        ([member(workdir="converted")], "workdir='converted' names no data"),
        (
            [Member("x", types.SimpleNamespace(model=models.build(
                models.LSTMConfig(vocab_size=7)), workdir="x"))],
            "workdir='x': LSTM has no mechanism of attention",
        ),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_read_so(given, message):
    with pytest.raises(UserError) as error:
        transfer_runs.given(given)
    assert message in error.value.line()


@pytest.mark.parametrize("flag", ["--steps=0", "--tokens=-1", "--tokens=7"])
def test_bad_input_is_one_line(flag, tmp_path, capsys):
    assert compare.main(["transfer:tiny", f"--out={tmp_path}", flag]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and flag in err
    assert not any(tmp_path.iterdir())
