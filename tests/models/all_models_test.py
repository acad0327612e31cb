"""Every model that has a name: trained on a mesh, carried over hosts, read, planned."""

import functools
import math
import subprocess
import sys

import all_models
import jax
import pytest
from all_models import STEPS, Resumed, make_config
from cluster import HERE, environment, free_port
from training_runs import assert_close

from xlformer import config as config_lib
from xlformer import evaluate, generate, models, plan, runs, sharding
from xlformer.machines import plan_text
from xlformer.runs.checkpoints import Checkpoints
from xlformer.train import train

SPLIT = {"data": 2, "fsdp": 2, "tensor": 2}
DEADLINE = 120  # seconds of the two hosts, who need about one for each model
every_model = pytest.mark.parametrize("name", list(models.MODELS))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return all_models.folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def trained(path):
    """trained(name): the result of a run on one device in the folder `name`."""

    @functools.cache
    def run(name):
        return train(make_config(name, path), path / name)

    return run


@pytest.fixture(scope="module")
def saved_on_two_hosts(path, trained):
    """The folder of checkpoints of all models."""
    for name in models.MODELS:
        trained(name)
    port, found = free_port(), []
    for number in range(2):
        flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
        command = [sys.executable, str(HERE / "all_models.py"), str(path), *flags]
        found.append(
            subprocess.Popen(
                [*command, f"--process_id={number}"],
                env=environment(devices=1),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [host.communicate(timeout=DEADLINE)[0] for host in found]
    finally:
        for host in found:
            host.kill()
    assert [host.returncode for host in found] == [0, 0], "\n".join(said)
    return path / "hosts"


@every_model
def test_saved_on_two_hosts_it_goes_on_over_a_mesh_with_one_devices_numbers(
    name, path, trained, saved_on_two_hosts
):
    result, model = trained(name), runs.load(path / name).model
    config = make_config(name, path)
    run = Resumed(config, model, saved_on_two_hosts / name, SPLIT)
    found, metrics = run.finish()
    with Checkpoints(path / name / "checkpoints", read_only=True) as checkpoints:
        step, wanted, _ = checkpoints.restore(run.made.abstract)
    assert step == int(found.step) == STEPS
    for part in ("params", "opt_state", "ema", "carried"):
        assert_close(getattr(found, part), getattr(wanted, part), rtol=1e-4)
    assert metrics["train/loss_nats"] == pytest.approx(result["train/loss_nats"], 1e-5)


@every_model
def test_it_is_read_over_a_mesh_and_continued(name, path, trained, capsys):
    expected = trained(name)["eval/nats_per_token"]
    mesh = sharding.make_mesh(SPLIT)
    card = evaluate.evaluate(path / name, params="ema", max_tokens=163, mesh=mesh)
    assert card["nats_per_token"] == pytest.approx(expected, rel=1e-5)
    assert card["step"] == STEPS and card["device"] == "cpu x8"
    capsys.readouterr()
    flags = [f"--workdir={path / name}", "--prompt=she sells", "--num_tokens=5"]
    assert generate.main(flags) == 0
    said = capsys.readouterr().out
    assert said.startswith("she sells") and len(said) == len("she sells") + 5 + 1


@every_model
def test_it_learns_from_what_it_has_scored(name, path, trained):
    """With parameters that two devices share; the text repeats itself."""
    expected = trained(name)["eval/nats_per_token"]
    options = {"max_tokens": 163, "mesh": sharding.make_mesh({"data": 1, "fsdp": 2})}
    card = evaluate.evaluate(path / name, dynamic="sgd", dynamic_rate=0.1, **options)
    assert card["nats_per_token"] < 0.995 * expected


@every_model
def test_a_memory_is_asked_only_of_a_model_that_has_one(name, path, trained, capsys):
    trained(name)
    workdir, flag = f"--workdir={path / name}", "--memory_length=5"
    if "memory_length" in make_config(name, path).model:
        assert runs.load(path / name).model.for_reading(memory_length=5)
        return
    for command, flags in ((evaluate, []), (generate, ["--prompt=she"])):
        capsys.readouterr()
        assert command.main([workdir, flag, *flags]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: {flag}: ") and "has no memory_length" in line
        assert line.count("\n") == 1


@every_model
def test_a_plan_counts_it_and_splits_its_matrices(name):
    config = config_lib.default_config(name, vocab_size=29)
    config.train.batch_size = 8
    found = plan.plan(config, "v5e:2x4", sizes=SPLIT, arithmetic=True)
    assert found["flops"]["useful"] > 0 and found["memory"]["temporaries"] > 0
    assert not [n for n, size in found["least_sent"].items() if size is None]
    shapes = jax.eval_shape(models.build(config.model).init, jax.random.key(0))
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    shown = plan_text.render(found, parameters=True)
    assert f"{total:,} numbers" in shown
    split = [x for x in found["parameters"] if any(x["over"])]
    numbers = sum(math.prod(x["shape"]) for x in split)
    assert numbers > 0.9 * total  # norms are whole, and learned positions
    for matrix in split:
        # The axes are for columns and rows: a vector has one of them.
        over = {axis for axes in matrix["over"] for axis in axes}
        large = math.prod(matrix["shape"]) > total / 50
        assert over == {"fsdp", "tensor"} or not large, matrix
        assert matrix["name"] in shown
