"""The vanilla Transformer: the contract, its numbers, its losses, its one window."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_run
from golden import check
from training_runs import refusal, text_config, write_text

from xlformer import config as config_lib
from xlformer import evaluate, generate, models, runs, testing
from xlformer.models import VanillaConfig
from xlformer.models.base import Model
from xlformer.scoring import Tally
from xlformer.train import train

V, CONTEXT, STEPS = 19, 30, 24
SIZES = dict(vocab_size=V, n_layer=3, d_model=8, n_head=2, d_inner=11)
SIZES |= dict(context_length=CONTEXT, attention_bias=True, loss_steps=STEPS)
NO_LOSSES = dict(layer_losses=False, second_target_weight=0.0)
QUIET = dict(dropout=0.0, attention_dropout=0.0)
GOLDEN = pathlib.Path(check.__file__).parent / "vanilla_formulas.npz"


def build(**fields):
    return models.build(VanillaConfig(**SIZES | fields))


def test_keeps_the_contract_with_all_auxiliary_losses():
    with jax.enable_x64(True):
        testing.check_model(build(dropout=0.3, attention_dropout=0.2, loss_steps=23))


def test_agrees_with_its_formulas():
    result = check.check(GOLDEN)
    assert result.ok and result.compared == 75, result.problems


# The auxiliary losses -----------------------------------------------------------------


@pytest.fixture(scope="module")
def batch():
    """Parameters of the model with all losses, and a segment of tokens."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(build().init, jax.random.key(0))
    params = jax.tree.map(lambda x: random.normal(size=x.shape, scale=0.5), shapes)
    tokens = random.integers(V, size=(2, 8))
    return params, tokens[:, :-1], tokens[:, 1:]


def both(model, params, inputs_BT, targets_BT, step):
    """Scored, as in training, and by layers, as numpy arrays."""
    arrays = params, inputs_BT, targets_BT
    # What nobody knows, the target after the last one, is any token here.
    second_BT = jnp.roll(targets_BT, -1, axis=1)
    return (
        model.apply(*arrays, (), step=step),
        model.apply(*arrays, (), step=step, train=True),
        model.layers(*arrays, second_BT),
    )


def test_training_adds_what_its_layers_say_of_known_tokens(batch):
    """Layers 1, 2 of 3 end at 24/6 and 48/6; the last position has one target."""
    with jax.enable_x64(True):
        run = jax.jit(functools.partial(both, build(**QUIET)))
        found = [
            jax.tree.map(np.asarray, run(*batch, step)) for step in (0, 4, 8, STEPS)
        ]
    for count, (scored, trained, by_layer) in zip((3, 2, 1, 1), found, strict=True):
        _, next_LBT, second_LBT = by_layer
        nll_BT, _, aux = trained
        for other_BT in (scored[0], next_LBT[-1]):
            np.testing.assert_allclose(nll_BT, other_BT, rtol=1e-12)
        assert scored[2].loss == 0 and scored[2].metrics == {}
        inner = next_LBT[3 - count : -1].mean((1, 2)).sum()
        second = second_LBT[3 - count :, :, :-1].mean((1, 2)).sum()
        np.testing.assert_allclose(aux.loss, inner + 0.5 * second, rtol=1e-12)
        assert aux.metrics["auxiliary/layers"] == count
        assert aux.metrics["auxiliary/loss"] == aux.loss


def test_without_its_layers_only_the_last_one_predicts_what_comes_after_next(batch):
    params, inputs_BT, targets_BT = batch
    kept = {name: x[-1:] for name, x in params["auxiliary"].items() if "second" in name}
    run = jax.jit(functools.partial(both, build(layer_losses=False, **QUIET)))
    scored, trained, by_layer = run(
        {**params, "auxiliary": kept}, inputs_BT, targets_BT, 0
    )
    _, next_1BT, second_1BT = map(np.asarray, by_layer)
    np.testing.assert_allclose(next_1BT[0], scored[0], rtol=1e-5)
    np.testing.assert_allclose(
        trained[2].loss, 0.5 * second_1BT[0, :, :-1].mean(), rtol=1e-5
    )


def test_classifiers_are_there_for_the_losses_alone():
    each, sizes = SIZES["d_model"] * V + V, []
    for fields in (
        {},
        {"second_target_weight": 0.0},
        {"layer_losses": False},
        NO_LOSSES,
    ):
        shapes = jax.eval_shape(build(**fields).init, jax.random.key(0))
        sizes.append(sum(x.size for x in jax.tree.leaves(shapes)))
    assert [(size - sizes[-1]) / each for size in sizes] == [5, 2, 1, 0]
    small = config_lib.load("vanilla_small:auxiliary=False").model
    assert models.build(small, vocab_size=V).config.classified == (0, 0)


# The table of positions ---------------------------------------------------------------


def test_nothing_is_longer_than_the_table_of_positions():
    ids_BT = np.zeros((1, CONTEXT + 1), int)
    model = build()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    line = refusal(jax.eval_shape, model.apply, shapes, ids_BT, ids_BT, ())
    assert "a segment of 31 tokens" in line and "context_length=30" in line
    config = config_lib.load("vanilla_small:debug").unlock()
    for section in ("train", "eval"):
        config[section].segment_length = 12
        line = refusal(config_lib.check, config)
        assert line.startswith(
            f"config.{section}.segment_length=12 is more than the 11"
        )
        config[section].segment_length = 11
    config_lib.check(config)
    # Lengths that vary are padded to 15 tokens more.
    config.train.variable_length = True
    line = refusal(config_lib.check, config)
    assert "=11 with variable_length=True, up to 26, is more than the 11 tok" in line
    config.model.context_length = 26
    config_lib.check(config)
    line = refusal(build, extended_length=CONTEXT)
    assert "extended_length=30 must be below config.model.context_length=30" in line


# A run --------------------------------------------------------------------------------

FIELDS = dict(n_layer=2, d_model=8, n_head=2, d_inner=11, context_length=7)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The work directory of 8 steps of 2 layers: the first predicts in 2 of them."""
    path = tmp_path_factory.mktemp("vanilla")
    like = text_config(write_text(path / "text.txt"), steps=8, log_every=1)
    config = config_lib.default_config("vanilla", **FIELDS, scan_layers=True)
    for section in ("data", "train", "optimizer", "eval", "mesh"):
        config[section].update(like[section])
    config.data.directory = str(path / "prepared")
    config.train.update(eval_every=0, save_every=0)
    train(config, path / "run")
    return path / "run"


def test_the_layers_losses_end_with_the_steps_of_the_run(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found = [r["auxiliary/layers"] for r in records if "auxiliary/layers" in r]
    assert found == [2, 2] + [1] * 6
    assert runs.load(run).config.model.loss_steps == 0


def one_by_one(run, tokens, window):
    """The nll of each token but the first, of the last `window` tokens before it."""
    model, (targets,) = run.model, tokens[None, 1:]
    apply = jax.jit(model.apply)
    found = []
    for i in range(len(targets)):
        begin = max(0, i + 1 - window)
        # Padded behind, which a causal model does not see: one program.
        inputs_BT = np.zeros((1, window), int)
        inputs_BT[0, : i + 1 - begin] = tokens[begin : i + 1]
        targets_BT = np.zeros_like(inputs_BT)
        targets_BT[0, i - begin] = targets[i]
        nll_BT, *_ = apply(run.params, inputs_BT, targets_BT, ())
        found.append(float(nll_BT[0, i - begin]))
    return np.array(found)


def by_token(monkeypatch, workdir, **fields):
    """A card, and the nll by the place of the target, each once."""
    tally, add = {}, Tally.add

    def note(self, scored):
        for place, nll in zip(scored.index_N.tolist(), scored.nll_N, strict=True):
            assert place not in tally
            tally[place] = nll
        add(self, scored)

    with monkeypatch.context() as patch:
        patch.setattr(Tally, "add", note)
        card = evaluate.evaluate(workdir, **fields)
    return card, np.array([tally[i] for i in range(1, len(tally) + 1)])


def test_a_window_that_slides_is_a_loop_over_targets(run, monkeypatch):
    loaded = runs.load(run)
    text = (run.parent / "text.txt").read_text()
    tokens = loaded.vocabulary.encode(text)[:45]
    own = run.parent / "short.txt"
    own.write_text(text[:45])
    expected = one_by_one(loaded, tokens, 5)
    options = dict(text=str(own), segment_length=5)
    for rows, stride in ((1, 1), (4, 1), (3, 2)):
        fields = dict(stride=stride, batch_size=rows, **options)
        card, found = by_token(monkeypatch, run, **fields)
        assert card["stride"] == stride and card["extended_length"] == 5 - stride
        assert card["segment_length"] == 5 and card["tokens_scored"] == 44
        assert card["tokens_read_per_target"] == round(5 * card["windows"] / 44, 2)
        # Of a window of stride 2 the last target has all that it is for.
        places = np.arange(stride - 1, 44, stride)
        np.testing.assert_allclose(found[places], expected[places], rtol=1e-5)
    # Without a stride, or with all of the window, the last of each segment.
    plain, segments = by_token(monkeypatch, run, batch_size=1, **options)
    whole, same = by_token(monkeypatch, run, batch_size=1, stride=5, **options)
    np.testing.assert_array_equal(segments, same)
    np.testing.assert_allclose(segments[4::5], expected[4::5], rtol=1e-5)
    assert "stride" not in plain and whole["tokens_read_per_target"] == 1.02


def test_a_longer_prompt_slides_and_says_so(run, capsys):
    flags = [f"--workdir={run}", "--num_tokens=3", "--temperature=0.01"]
    said = []
    for prompt in ("the cat sat on", "cat sat on"[-7:]):
        capsys.readouterr()
        assert generate.main([*flags, f"--prompt={prompt}"]) == 0
        said.append(capsys.readouterr())
    assert "has 14 tokens, of which the model sees the last 7" in said[0].err
    assert "sees" not in said[1].err
    assert said[0].out.split("sat on")[1] == said[1].out.split("sat on")[1]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--stride=-1"], "--stride=-1 must not be negative"),
        (
            ["--stride=6", "--segment_length=5"],
            "more than the window, --segment_length=5",
        ),
        (["--stride=1", "--segment_length=8"], "--segment_length=8 is more than the 7"),
        (["--segment_length=8"], "--segment_length=8 is more than the 7"),
        (["--memory_length=3"], "--memory_length=3: VanillaTransformer has no memory"),
    ],
)
def test_what_it_cannot_be_read_with_is_one_line(run, flags, expected, capsys):
    assert evaluate.main([f"--workdir={run}", *flags]) == 2
    line = capsys.readouterr().err
    assert expected in line and line.count("\n") == 1


class Stateless(Model):
    """One's own, with a config that knows nothing of windows."""

    memory_length = 0


def test_a_window_is_for_models_that_carry_nothing():
    settings = evaluate.EvalSettings(stride=2, segment_length=7)
    xl = dict(vocab_size=V, n_layer=1, d_model=8, n_head=2, d_inner=8)
    line = refusal(settings.model, models.build(models.TransformerXLConfig(**xl)))
    assert line.startswith("stride=2: TransformerXL has a state")
    without = models.TransformerXLConfig(**xl, memory_length=0)
    assert settings.model(models.build(without)).extended_length == 5
    zeros = models.TransformerXLConfig(**xl, memory_length=0, attend_zero_memory=True)
    line = refusal(settings.model, models.build(zeros))
    assert line.startswith("stride=2: TransformerXL can be reset only before a segm")
    settings.replaced(stride=7).model(models.build(zeros))
    lstm = models.build(models.LSTMConfig(vocab_size=V))
    assert "LSTM has a state" in refusal(settings.model, lstm)
    own = Stateless(VanillaConfig.RULES)
    assert "Stateless has no extended_length" in refusal(settings.model, own)
    fields = dict(vocab_size=V, n_step=2, d_model=8, n_head=2, d_inner=8)
    ahead = models.build(models.UniversalConfig(**fields, causal=False))
    assert "looks ahead" in refusal(settings.model, ahead)
    fields |= dict(positions="learned", table_length=7, act="convex")
    steps = models.build(models.UniversalConfig(**fields))
    window, ids_BT = settings.model(steps), np.arange(14).reshape(2, 7)
    params, state = trained_run.random_params(steps), steps.init_state(2)
    nll_BT = jax.jit(steps.apply)(params, ids_BT, ids_BT, state)[0]
    found_BT = jax.jit(window.apply)(params, ids_BT, ids_BT[:, 5:], state)[0]
    np.testing.assert_allclose(found_BT, nll_BT[:, 5:], rtol=1e-6)
    assert window.longest_segment == 2 and window.replay(2) == 3
    assert window.for_generation() == steps.for_generation()
    line = refusal(models.UniversalConfig, memory_length=3, extended_length=2)
    assert "extended_length=2 with config.model.memory_length=3" in line
