"""Who the other hosts are, without any: what the environment and the flags say."""

import argparse

import pytest
from training_runs import refusal

from xlformer.hosts import job

SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
TPU = {"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "1"}


@pytest.fixture
def environment(monkeypatch):
    def put(values):
        for name in (*SLURM, *TPU, "MEGASCALE_NUM_SLICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({}, None),
        (SLURM, (4, 2)),
        (TPU, (3, 1)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, (1, 0)),
        # In the batch script itself, outside of srun, there is no step.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),
        # Several slices: the names are those of one of them.
        (TPU | {"MEGASCALE_NUM_SLICES": "2"}, None),
    ],
)
def test_place_by_the_environment(environment, values, place):
    environment(values)
    assert job._own_place() == place


def join(tmp_path, **flags):
    parser = argparse.ArgumentParser()
    job.add_flags(parser)
    args = parser.parse_args([f"--{k}={v}" for k, v in flags.items()])
    job.join(args, workdir=tmp_path, start_limit=9, heartbeat=9)


def test_what_joins_and_with_which_limits(environment, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        job.jax.distributed, "initialize", lambda *a, **k: calls.append((a, k))
    )
    environment({})
    join(tmp_path)
    environment({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"})
    join(tmp_path)
    assert calls == []  # alone
    environment(SLURM)
    join(tmp_path)
    join(tmp_path, coordinator="h:1", num_processes=2, process_id=1)
    # JAX's own limits come after ours.
    limits = {"initialization_timeout": 69, "heartbeat_timeout_seconds": 19}
    assert calls == [((None, None, None), limits), (("h:1", 2, 1), limits)]


def test_flags_go_together(tmp_path):
    assert "go together" in refusal(join, tmp_path, coordinator="h:1")
    line = refusal(join, tmp_path, coordinator="h:1", num_processes=2, process_id=-1)
    assert line == "process_id=-1 must be from 0 to num_processes=2 - 1"


def test_in_one_process_there_is_nothing_to_agree_on(tmp_path):
    job.agree(tmp_path / "none", config="x")
    assert not (tmp_path / "none").exists()
