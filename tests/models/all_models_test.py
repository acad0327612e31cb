"""Every model that has a name: trained on meshes and hosts, resumed, read, planned."""

import functools
import json
import math
import subprocess
import sys

import all_models
import jax
import pytest
from all_models import SAVED, SPLIT, STEPS, make_config
from cluster import HERE, environment, free_port
from training_runs import assert_close, final_state

from xlformer import config as config_lib
from xlformer import evaluate, generate, models, plan, runs, sharding
from xlformer.train import train

DEADLINE = 120  # seconds of the two hosts, who need a few for each model
every_model = pytest.mark.parametrize("name", list(models.MODELS))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return all_models.folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def trained(path):
    """trained(name, mesh): (work directory, result), of one process."""

    @functools.cache
    def run(name, split=False):
        workdir = path / ("split" if split else "one") / name
        config = make_config(name, path, SPLIT if split else {"data": 1})
        return workdir, train(config, workdir)

    return run


@pytest.fixture(scope="module")
def on_two_hosts(path):
    """The folder of runs of SAVED steps, by model."""
    port, hosts = free_port(), []
    for number in range(2):
        flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
        command = [sys.executable, str(HERE / "all_models.py"), str(path), *flags]
        hosts.append(
            subprocess.Popen(
                [*command, f"--process_id={number}"],
                env=environment(devices=1),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [host.communicate(timeout=DEADLINE)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(said)
    return path / "hosts"


def assert_same_end(name, path, workdir, result, reference):
    """The whole training state, and the losses of training and of evaluation."""
    at, expected = reference
    config = make_config(name, path)
    model = runs.load(at).model
    (step, found, _), (_, wanted, _) = (
        final_state(place, config, model) for place in (workdir, at)
    )
    assert step == result["step"] == STEPS
    assert_close(found, wanted, rtol=1e-4)
    for loss in ("train/loss_nats", "eval/nats_per_token"):
        assert result[loss] == pytest.approx(expected[loss], rel=1e-5)


@every_model
def test_a_mesh_gives_the_numbers_of_one_device(name, path, trained):
    assert_same_end(name, path, *trained(name, split=True), trained(name))


@every_model
def test_saved_on_two_hosts_and_resumed_on_one(name, path, on_two_hosts, trained):
    workdir = on_two_hosts / name
    assert runs.load(workdir).step == SAVED
    result = train(make_config(name, path), workdir)
    assert_same_end(name, path, workdir, result, trained(name))


@every_model
def test_the_commands_read_it(name, trained, capsys):
    workdir, result = trained(name)
    mesh = sharding.make_mesh({"data": 1})
    card = evaluate.evaluate(workdir, params="ema", max_tokens=163, mesh=mesh)
    assert card["nats_per_token"] == pytest.approx(result["eval/nats_per_token"], 1e-5)
    assert card["step"] == STEPS and card["batch_rows"] == 8
    capsys.readouterr()
    flags = [f"--workdir={workdir}", "--prompt=she sells", "--num_tokens=5"]
    assert generate.main(flags) == 0
    said = capsys.readouterr().out
    assert said.startswith("she sells") and len(said) == len("she sells") + 5 + 1


@every_model
def test_a_plan_counts_it_and_splits_its_matrices(name, capsys, tmp_path):
    config = all_models.config_name(name)
    file, mesh = tmp_path / "plan.json", "--mesh=data=2,fsdp=2,tensor=2"
    flags = [f"--config={config}", "--topology=v5e:2x4", "--arithmetic", mesh]
    flags += ["--config.train.batch_size=8", "--config.model.vocab_size=29"]
    assert plan.main([*flags, "--parameters", f"--json={file}"]) in (0, 1)
    found = json.loads(file.read_text())
    assert found["flops"]["useful"] > 0 and found["memory"]["temporaries"] > 0
    assert not [n for n, size in found["least_sent"].items() if size is None]
    shape = jax.eval_shape(
        models.build(config_lib.load(config).model, vocab_size=29).init,
        jax.random.key(0),
    )
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(shape))
    assert f"{total:,} numbers" in capsys.readouterr().out
    matrices = [x for x in found["parameters"] if math.prod(x["shape"]) > total / 50]
    assert matrices
    for matrix in matrices:
        assert {a for axes in matrix["over"] for a in axes} == {"fsdp", "tensor"}, matrix
