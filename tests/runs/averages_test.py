"""average:N: the mean of the parameters of the last N checkpoints of a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_run
from training_runs import refusal

from xlformer import config as config_lib
from xlformer import evaluate, runs, sharding
from xlformer.instruments import members
from xlformer.reporting import setup
from xlformer.runs import averages
from xlformer.runs.checkpoints import Checkpoints

SHAPE = (31, 17)


@pytest.fixture
def workdir(base, tmp_path):
    return trained_run.copy(base, tmp_path / "run")


def keep(workdir, count):
    """What the run was told to keep, as if it had been."""
    path = workdir / runs.CONFIG
    found = json.loads(path.read_text())
    found["train"]["keep"] = count
    path.write_text(json.dumps(found))


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


# The mean -----------------------------------------------------------------------------


def tree(step):
    rng = np.random.default_rng(step)
    return {
        "x": jnp.asarray(rng.normal(size=SHAPE), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(5,)), jnp.bfloat16),
        "ids": jnp.arange(3) + step,
    }


@pytest.mark.parametrize("count", [2, 3, 8])
def test_it_is_the_mean_of_floats_and_the_first_of_the_rest(count):
    steps = range(count, 0, -1)
    found = averages.mean(tree, steps)
    wide = {
        name: np.stack([np.asarray(tree(s)[name], np.float64) for s in steps])
        for name in ("x", "half")
    }
    assert found["x"].dtype == jnp.float32 and found["half"].dtype == jnp.bfloat16
    largest = np.abs(wide["x"]).max(0)
    error = np.abs(np.asarray(found["x"], np.float64) - wide["x"].mean(0))
    assert (error <= count * 2.0**-24 * largest).all()
    # Added up in bfloat16 it would be some roundings away.
    rounded = jnp.asarray(wide["half"].mean(0), jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found["half"], rounded)
    np.testing.assert_array_equal(found["ids"], tree(count)["ids"])


def test_of_one_it_is_that_one_to_the_bit():
    zeros = {"x": jnp.array([-0.0, jnp.nan, 1e-45])}
    found = np.asarray(averages.mean(lambda _: zeros, [7])["x"])
    assert found.tobytes() == np.asarray(zeros["x"]).tobytes()


def test_two_trees_are_in_memory_and_no_more():
    def alive():
        return sum(x.shape == SHAPE for x in jax.live_arrays())

    before, seen = alive(), []

    def read(step):
        seen.append(alive() - before)
        return tree(step)

    averages.mean(read, range(5))
    assert seen == [0, 1, 1, 1, 1]


# Of a run -----------------------------------------------------------------------------


@pytest.mark.parametrize("params", ["raw", "ema"])
def test_a_run_is_read_as_the_mean_of_its_last_checkpoints(base, params):
    workdir = trained_run.trained(base)
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2})
    one, two = (runs.load(workdir, checkpoint=n, params=params) for n in (1, 2))
    found = runs.load(workdir, checkpoint="average:2", params=params)
    assert (found.step, found.mean_of, found.checkpoint) == (2, (1, 2), "average:2")
    assert found.averaged == (params == "ema") and one.checkpoint == "1"
    # Of two floats the sum is rounded once, and half of it not at all.
    half = jax.tree.map(lambda a, b: (np.asarray(a) + b) / 2, one.params, two.params)
    assert same(found.params, half) and not same(found.params, two.params)
    over = runs.load(workdir, checkpoint="average:2", params=params, mesh=mesh)
    assert same(found.params, over.params)
    assert any(len({*x.devices()}) == 4 for x in jax.tree.leaves(over.params))
    last = runs.load(workdir, checkpoint="average:1", params=params)
    assert same(last.params, two.params) and last.mean_of == (2,)


def test_whoever_reads_it_says_of_which_steps(base, tmp_path, capsys):
    workdir = trained_run.copy(base, tmp_path / "run")
    for checkpoint in ("average:2", "2"):
        flags = ["--workdir", str(workdir), f"--checkpoint={checkpoint}"]
        assert evaluate.main([*flags, "--warmup=none"]) == 0
    found = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x[0] == "{"]
    assert found[0]["steps_averaged"] == [1, 2] and "steps_averaged" not in found[1]
    assert found[0]["nats_per_token"] != found[1]["nats_per_token"]
    index = json.loads((workdir / runs.EVALUATIONS / "index.json").read_text())
    assert [entry["steps_averaged"] for entry in index] == [[1, 2], None]
    (member,) = members.load([workdir], checkpoint="average:2")
    assert member.facts()["steps_averaged"] == (1, 2)
    assert setup.weights(member.run) == {
        "step": 2,
        "mean of steps": "1, 2",
        "weights": "average (ema)",
    }


# What it cannot be --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("average:0", "checkpoint='average:0': N of average:N is a whole number"),
        ("average:x", "checkpoint='average:x': N of"),
        ("average:-1", "N of average:N is a whole number, at least 1"),
        ("average:", "N of"),
        ("average:" + "9" * 5000, "N of"),
        ("average", "is neither best, latest, average:N nor a step"),
        ("average:3", "keeps its last 2 checkpoints (config.train.keep=2)"),
        ("average:3", "train with config.train.keep=3 or more"),
    ],
)
def test_what_is_no_mean_is_one_line(base, which, message):
    workdir = trained_run.trained(base)
    assert message in refusal(runs.load, workdir, checkpoint=which)
    assert message in refusal(runs.read_sealed, workdir, which)


def test_of_more_than_there_are_is_one_line(workdir):
    keep(workdir, 2**31 - 1)
    for count in (3, 2**31 - 1):
        line = refusal(runs.load, workdir, checkpoint=f"average:{count}")
        assert f"checkpoint='average:{count}': there are 2 checkpoints in" in line
        assert "steps 1, 2 (config.train.save_every=1)" in line


def test_a_damaged_one_among_them_is_said(workdir):
    (workdir / runs.CHECKPOINTS / "1" / "digest" / "metadata").write_bytes(b"{}")
    assert runs.load(workdir, checkpoint="average:1").step == 2
    line = refusal(runs.load, workdir, checkpoint="average:2")
    assert "no intact checkpoint: step 1: the digest" in line


def test_checkpoints_of_other_models_have_no_mean(workdir):
    keep(workdir, 3)
    found = runs.load(workdir, params="raw", checkpoint="2")
    config = config_lib.to_dict(found.config)
    config["train"]["ema_decay"] = 0.0
    wider = jax.tree.map(lambda x: np.zeros((*x.shape, 2), x.dtype), found.params)
    for params, changes, message in (
        (wider, {}, "the checkpoint has params/"),
        (found.params, {"n_head": 7, "d_head": 2}, "n_head=2 (7 there), at step 2"),
    ):
        older = json.loads(json.dumps(config))
        older["model"] |= changes
        with Checkpoints(workdir / runs.CHECKPOINTS, keep=3) as checkpoints:
            checkpoints.save(2, {"params": params}, config=older, replace=True)
            checkpoints.save(3, {"params": found.params}, config=config)
        line = refusal(runs.load, workdir, params="raw", checkpoint="average:2")
        assert message in line
        assert runs.load(workdir, params="raw", checkpoint="3").step == 3


def test_followed_checkpoints_have_no_mean(base, capsys):
    flags = ["--workdir", str(trained_run.trained(base)), "--checkpoint=average:2"]
    assert evaluate.main([*flags, "--follow"]) == 2
    assert "--checkpoint=average:2 with --follow" in capsys.readouterr().err
