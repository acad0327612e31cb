"""Dynamic evaluation: what a segment is scored with, and what it changes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_run
from own_model import Config, Gated
from training_runs import Bag, assert_close, bag, refusal

from xlformer import evaluate, scoring, sharding
from xlformer.errors import Argument
from xlformer.scoring import dynamic, settings, squares
from xlformer.scoring import evaluator as evaluator_lib

V, T, TOKENS = 13, 5, 38  # seven segments and a part of one
DOCUMENTS = np.array([0, 3, 17])
SGD = {"rate": 0.3, "decay": 0.05, "epsilon": None}
# Of the sizes here, 3 % have a share of more than 1 of the way back.
RMS = {"rate": 0.02, "decay": 0.4, "epsilon": 1e-3}


class Seen(scoring.Tally):
    """Keeps the nll of each target, by its place."""

    def __init__(self):
        super().__init__()
        self.nll = {}

    def add(self, scored):
        super().add(scored)
        self.nll |= dict(zip(scored.index_N.tolist(), scored.nll_N, strict=True))


@functools.cache
def text(seed=13, tokens=TOKENS):
    return np.random.default_rng(seed).integers(0, V, tokens).astype(np.uint8)


def plan_of(tokens=TOKENS, rows=1):
    return scoring.cut_rows(
        tokens,
        batch_size=rows,
        segment_length=T,
        memory_length=None,
        n_layer=1,
        warmup="none",
    )


@pytest.fixture(autouse=True)
def small_calls(monkeypatch):
    """Three segments a call: the last one has a segment of padding after the text."""
    monkeypatch.setattr(evaluator_lib, "TOKENS_PER_CALL", 3 * T)


# In float64, against a loop -----------------------------------------------------------


@functools.cache
def gated():
    """A model with a state, float64 parameters, and its gradient at a segment."""
    model = Gated(Config(V, width=7))
    params = trained_run.random_params(model)
    params = jax.tree.map(lambda x: 0.5 * x.astype(np.float64), params)

    def loss(params, state, *arrays):
        nll_BT, state, _ = model.apply(params, *arrays[:2], state, resets_BT=arrays[2])
        return nll_BT.mean(), (nll_BT[0], state)

    return model, params, jax.jit(jax.grad(loss, has_aux=True))


def segments(tokens, documents, first=0, last=None):
    """The arrays of each segment of the one row, from `first` on, cold."""
    last = len(tokens) - 1 if last is None else last
    for start in range(first, last, T):
        index = np.arange(start, min(start + T, last))
        inputs_BT, targets_BT = (
            tokens[None, i].astype(int) for i in (index, index + 1)
        )
        yield inputs_BT, targets_BT, np.isin(index, [first, *documents])[None]


def loop(tokens, given):
    """Segment by segment: all nll, and the parameters after the last segment."""
    model, trained, gradient = gated()
    params, state, nll = trained, model.init_state(1, jnp.float64), []
    for arrays in segments(tokens, DOCUMENTS):
        grads, (nll_T, state) = gradient(params, state, *arrays)
        nll += np.asarray(nll_T).tolist()
        params = by_hand(given, params, grads)
    return nll, params


def by_hand(given, params, grads):
    p, p0, g = (jax.tree.leaves(x) for x in (params, given.params, grads))
    if given.rms is None:
        steps = [given.rate * x for x in g]
        back = [given.decay] * len(p)
    else:
        s = [np.asarray(x) for x in jax.tree.leaves(given.rms)]
        mean = np.concatenate([x.ravel() for x in s]).mean()
        steps = [
            given.rate * x / (y + given.epsilon) for x, y in zip(g, s, strict=True)
        ]
        back = [np.minimum(given.decay * x / mean, 1) for x in s]
        assert 0 < sum((x == 1).sum() for x in back) < sum(x.size for x in back)
    columns = zip(p, p0, steps, back, strict=True)
    new = [np.asarray(a) - step + d * (b - a) for a, b, step, d in columns]
    return jax.tree.structure(params).unflatten(new)


def root_by_hand(tokens, starts, each):
    model, params, gradient = gated()
    sums, count = jax.tree.map(np.zeros_like, params), 0
    for start in starts:
        state = model.init_state(1, jnp.float64)
        for arrays in segments(tokens, (), start, start + each * T):
            grads, (_, state) = gradient(params, state, *arrays)
            sums = jax.tree.map(lambda x, g: x + np.square(g), sums, grads)
            count += 1
    return jax.tree.map(lambda x: np.sqrt(x / count), sums), count


def test_each_segment_is_scored_by_what_was_learnt_before_it():
    model, params, _ = gated()
    mesh, plan = sharding.make_mesh({"data": 1}), plan_of()
    with jax.enable_x64(True):
        training = text(7, 131)
        # 26 segments, of which 17 are asked for: two in each of eight places.
        starts = [place * 26 // 8 * T for place in range(8)]
        expected, count = root_by_hand(training, starts, 2)
        rms, n = squares.root_mean(
            model,
            params,
            training,
            plan,
            documents=None,
            mesh=mesh,
            step=0,
            segments=17,
        )
        assert n == count == 16
        assert_close(rms, expected, rtol=1e-10, atol=1e-14)
        for given in (
            dynamic.Given(params, None, **SGD),
            dynamic.Given(params, rms, **RMS),
        ):
            seen = Seen()
            finished, (_, found) = dynamic.Dynamic.of(model, plan, mesh).read(
                given,
                text(),
                plan,
                documents=DOCUMENTS,
                step=0,
                progress=None,
                tally=seen,
            )
            nll, after = loop(text(), given)
            assert finished and list(seen.nll) == list(range(1, TOKENS))
            np.testing.assert_allclose([*seen.nll.values()], nll, 1e-10)
            assert_close(found, after, rtol=1e-9, atol=1e-14)


# What is learnt, and from what --------------------------------------------------------


@functools.cache
def bag_params():
    return trained_run.random_params(bag())


@functools.cache
def scorer(rows=1, devices=1):
    mesh = sharding.make_mesh({"data": devices})
    return dynamic.Dynamic.of(bag(), plan_of(rows=rows), mesh)


def learnt(tokens, rows=1, devices=1, **given):
    """The nll of each target, by its place."""
    seen, settings = Seen(), SGD | given
    given = dynamic.Given(bag_params(), None, **settings)
    scorer(rows, devices).score(given, tokens, plan_of(len(tokens), rows), tally=seen)
    return seen.nll


def test_a_rate_of_nothing_and_the_first_segment_are_static():
    static, plan = Seen(), plan_of()
    scoring.Evaluator.of(bag(), plan, None).score(
        bag_params(), text(), plan, tally=static
    )
    unmoved, moved = learnt(text(), rate=0.0), learnt(text())
    assert list(unmoved) == list(static.nll) == list(moved)
    np.testing.assert_allclose([*unmoved.values()], [*static.nll.values()], 1e-6)
    same = [i for i in moved if moved[i] == unmoved[i]]
    assert same == list(range(1, T + 1))


def test_no_score_depends_on_a_later_token():
    before = learnt(text())
    for place in (1, T, T + 1, 23, TOKENS - 1):
        other = text().copy()
        other[place] = (other[place] + 1) % V
        after = learnt(other)
        assert all(before[i] == after[i] for i in range(1, place)), place
        assert before[place] != after[place]


def test_rows_learn_together_from_segments_they_have_all_scored():
    """Row 1 begins at 19: a token of it is learnt by row 0 one segment later."""
    before, place = learnt(text(), rows=2), 19 + T + 2
    other = text().copy()
    other[place] = (other[place] + 1) % V
    after = learnt(other, rows=2)
    assert sorted(before) == [*range(1, 19), *range(20, 38)]
    same = sorted(i for i in before if before[i] == after[i])
    assert same == [*range(1, 2 * T + 1), *range(20, place)]
    with_one = learnt(text()[:19])
    assert [before[i] for i in range(1, T + 1)] == [
        with_one[i] for i in range(1, T + 1)
    ]
    assert before[T + 1] != with_one[T + 1]


def test_devices_change_nothing():
    """Of one row, beside which another device has one of padding; of three rows."""
    for rows in (1, 3):
        one, two = learnt(text(), rows), learnt(text(), rows, devices=2)
        assert one.keys() == two.keys()
        np.testing.assert_allclose([*two.values()], [*one.values()], 1e-5)
    found = [
        squares.root_mean(
            bag(),
            bag_params(),
            text(7, 131),
            plan_of(),
            documents=None,
            mesh=sharding.make_mesh({"data": devices}),
            step=0,
            segments=17,
        )[0]
        for devices in (1, 2)
    ]
    assert_close(*found, rtol=1e-5, atol=1e-7)


def test_a_short_training_text_is_looked_at_as_far_as_it_goes():
    places = squares.training_places(plan_of(), 4 * T, 256)
    assert (places.steps, places.each, places.offsets) == (3, 1, (0, T, 2 * T))
    places = squares.training_places(plan_of(), 10**6 * T + 1, 256)
    assert (places.steps, places.each) == (256, 32)
    assert places.offsets == tuple(125_000 * T * i for i in range(8))
    line = refusal(squares.training_places, plan_of(rows=3), 3 * T, 256)
    assert f"has {3 * T} tokens" in line and f"need {3 * T + 3}" in line


# The command --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(base, tmp_path_factory):
    return trained_run.copy(base, tmp_path_factory.mktemp("dynamic") / "run")


def files(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "evaluation" not in str(path.relative_to(directory))
    }


def test_cards_say_what_was_learnt_how_and_only_they_are_written(workdir, capsys):
    before = files(workdir)
    flags = [f"--workdir={workdir}", "--split=test"]
    assert evaluate.main([*flags, "--batch_size=1", "--segment_length=5"]) == 0
    capsys.readouterr()
    static = json.loads((workdir / "evaluation-test.json").read_text())
    flags += ["--dynamic=rms", "--dynamic_rate=0,1e-3", "--dynamic_segments=20"]
    assert evaluate.main(flags) == 0
    unmoved, moved = json.loads((workdir / "evaluation-test.json").read_text())
    assert unmoved["nats"] == pytest.approx(static["nats"], rel=1e-5)
    assert moved["nats"] < unmoved["nats"]
    said = {name: moved.get(name) for name in moved if name.startswith("dynamic")}
    assert said == {
        "dynamic": "rms",
        "dynamic_rate": 1e-3,
        "dynamic_decay": settings.RMS["dynamic_decay"],
        "dynamic_epsilon": settings.RMS["dynamic_epsilon"],
        "dynamic_segments": 16,
    }
    assert (moved["batch_rows"], moved["segment_length"]) == (1, 5)
    assert not [name for name in static if name.startswith("dynamic")]
    index = json.loads((workdir / "evaluations" / "index.json").read_text())
    assert [e["dynamic_rate"] for e in index[-3:]] == [None, 0.0, 1e-3]
    assert files(workdir) == before


def test_a_text_of_ones_own_and_rows(workdir, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(trained_run.TEXT * 3, encoding="utf-8")
    options = {"text": str(path), "dynamic": "sgd", "memory_length": 3}
    found = evaluate.evaluate(workdir, batch_size=2, **options)
    assert (found["batch_rows"], found["warmup"]) == (2, "none")
    assert found["memory_length"] == 3 and "dynamic_segments" not in found
    # Of the text that is not scored the path is the training text's.
    options |= {"dynamic": "rms", "data_path": str(path)}
    assert "holds another text" in refusal(evaluate.evaluate, workdir, **options)


def test_a_model_without_a_gradient_is_refused():
    class Foreign(Bag):
        def apply(self, params, *arrays, **options):
            nll_BT, *rest = super().apply(params, *arrays, **options)
            shape = jax.ShapeDtypeStruct(nll_BT.shape, nll_BT.dtype)
            return jax.pure_callback(lambda x: x, shape, nll_BT), *rest

    model = Foreign(bag().config)
    line = refusal(dynamic.check_gradient, model, Argument("dynamic", "sgd"), T)
    assert line.startswith("dynamic='sgd': Foreign has no gradient: ")
