"""The Performer in runs: from other weights, on both sides, refused in one line."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from training_runs import write_text

from xlformer import evaluate, generate, models, runs, sharding, train
from xlformer.kernels import linear_attention
from xlformer.kernels.features import Features
from xlformer.runs import leaves
from xlformer.training import start as start_lib

STILL = "--config.optimizer.learning_rate=0"  # the weights stay what they were


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("performer")
    write_text(path / "text.txt")
    return path


def trained(folder, name, form, *flags):
    """The exit code of a run of the small config on characters."""
    data = f"--config.data.path={folder / 'text.txt'}", "--config.data.unit=chars"
    return train.main(
        [
            f"--config=performer_small:debug,{form}",
            f"--workdir={folder / name}",
            "--config.data.corpus=text",
            *data,
            *flags,
        ]
    )


@pytest.fixture(scope="module")
def softmax_run(folder):
    assert trained(folder, "softmax", "mechanism=softmax,causal=False") == 0
    return folder / "softmax"


def one_line(capsys):
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def favor_run(folder, softmax_run):
    start = f"--init_from={softmax_run}:latest"
    favor = "--config.model.mechanism=favor"
    assert trained(folder, "favor", "causal=False", start, STILL, favor) == 0
    return folder / "favor"


def test_a_run_goes_on_from_the_weights_of_another_mechanism(softmax_run, favor_run):
    given, taken = runs.load(softmax_run), runs.load(favor_run)
    assert taken.config.model.mechanism == "favor"
    jax.tree.map(np.testing.assert_array_equal, given.params, taken.params)
    for name in ("lsh", "identity"):
        config = start_lib.with_model(
            given.config, str(softmax_run), "none", [f"model.mechanism={name}"]
        )
        model = models.build(config.model, given.model.vocab_size)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        assert leaves.layouts(shapes) == leaves.layouts(given.params)


def test_other_features_are_no_way_to_go_on(folder, favor_run, capsys):
    for field in ("n_features=9", "feature_seed=1", "features=relu"):
        flags = STILL, f"--config.model.{field}"
        assert trained(folder, "favor", "causal=False", *flags) == 2
        assert f"config.model.{field.partition('=')[0]}" in one_line(capsys)


def test_linformers_projections_are_in_no_other_weights(folder, softmax_run, capsys):
    flags = (
        f"--init_from={softmax_run}:latest",
        "--config.model.mechanism=linformer",
        "--config.model.causal=False",
    )
    form = "mechanism=linformer,causal=False"
    assert trained(folder, "linformer", form, *flags) == 2
    line = one_line(capsys)
    assert "its weights have other shapes than" in line
    assert "config.model.mechanism='linformer' ('softmax' there)" in line


def test_hidden_tokens_are_said_from_both_sides(favor_run, capsys):
    card = evaluate.evaluate(favor_run, split="test")
    assert card["objective"] == "masked" and math.isfinite(card["nats_per_token"])
    assert card["mechanism"] == "favor" and card["redraw_interval"] == 1000
    capsys.readouterr()
    assert generate.main([f"--workdir={favor_run}", "--prompt=the"]) == 2
    assert "cannot continue a text" in one_line(capsys)


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("model.window=5", "config.model has no field 'window'"),
        ("model.memory_length=5", "config.model has no field 'memory_length'"),
        ("eval.memory_length=5", "Performer has no memory_length"),
    ],
)
def test_a_window_or_a_memory_is_not_for_sums(folder, flag, line, capsys):
    assert trained(folder, "none", "batch=2", f"--config.{flag}") == 2
    assert line in one_line(capsys)


def test_rows_and_heads_stay_on_their_devices():
    """Attention exchanges nothing, forward or backward, however long a segment is."""
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2})
    split = NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor"))
    x_BTHK = jax.ShapeDtypeStruct((4, 600, 4, 4), jnp.float32, sharding=split)
    w_MK = jax.ShapeDtypeStruct((5, 4), jnp.float32, sharding=sharding.replicated(mesh))

    def attend(q_BTHK, k_BTHK, v_BTHK, d_BTHK, w_MK):
        def y(*arrays):
            return linear_attention.linear_attention(*arrays, Features(), w_MK)[0]

        return jax.vjp(y, q_BTHK, k_BTHK, v_BTHK)[1](d_BTHK)

    with jax.set_mesh(mesh):
        compiled = jax.jit(attend).lower(*[x_BTHK] * 4, w_MK).compile()
    exchanged = r"all-gather|all-reduce|all-to-all|collective|reduce-scatter"
    assert not re.findall(exchanged, compiled.as_text())
