"""launch/slurm.sbatch with a fake srun and scontrol: restarts, requeueing, signals."""

import os
import shlex
import signal

import pytest
from fake_commands import ROOT, Bench

# `steps` has the exit code of each srun in turn; 'wait' runs until SIGTERM, and saves.
SRUN = r"""
note "$@"
echo "${JAX_LOCAL_DEVICE_IDS:-unset}" >>"$FAKE/devices"
code=$(head -n 1 "$FAKE/steps")
sed -i 1d "$FAKE/steps"
[[ $code == wait ]] || exit "$code"
trap 'exit 42' TERM
touch "$FAKE/ready"
while :; do sleep 0.05; done
"""
SCONTROL = 'note "$@"'
ARGS = ["--workdir=/shared/run", "--config=text:path=a  b 'c' $HOME"]


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path, srun=SRUN, scontrol=SCONTROL)
    bench.environment |= {
        "PYTHON": "/bin/true",
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    bench.steps = lambda *codes: (tmp_path / "steps").write_text("\n".join(codes))
    yield bench
    bench.end()


def test_one_step_with_the_words_as_given(bench):
    bench.steps("0")
    assert bench.run("slurm.sbatch", *ARGS) == 0
    limits = ["--wait=60", "--kill-on-bad-exit=0"]
    command = ["/bin/true", "-m", "xlformer", "train", *ARGS]
    assert bench.calls() == [["srun", *limits, *command]]
    bench.steps("0")
    args = ["--workdir=/shared/run", "--split=test"]
    assert bench.run("slurm.sbatch", "evaluate", *args) == 0
    assert bench.calls()[1][3:] == ["/bin/true", "-m", "xlformer", "evaluate", *args]


def test_failures_restart_up_to_the_limit_and_bad_input_does_not(bench):
    bench.steps("134", "42", "0")
    assert bench.run("slurm.sbatch", *ARGS) == 0
    assert len(bench.calls()) == 3
    bench.steps("1", "137", "43")
    assert bench.run("slurm.sbatch", *ARGS, "--max_restarts=1") == 137
    assert len(bench.calls()) == 5 and "giving up after 1" in bench.output()
    bench.steps("2", "0")
    assert bench.run("slurm.sbatch", *ARGS) == 2
    assert len(bench.calls()) == 6


def signalled(bench, number, **more):
    bench.steps("wait")
    process = bench.start("slurm.sbatch", *ARGS, **more)
    try:
        bench.until((bench.directory / "ready").exists)
        os.kill(process.pid, number)
        return process.wait(30)
    finally:
        process.kill()


def test_when_the_time_is_up_it_saves_and_goes_back_into_the_queue(bench):
    assert signalled(bench, signal.SIGUSR1) == 42
    assert bench.calls()[1:] == [["scontrol", "requeue", "77"]]


def test_requeueing_has_a_limit(bench):
    assert signalled(bench, signal.SIGUSR1, SLURM_RESTART_COUNT="100") == 42
    assert len(bench.calls()) == 1 and "not put back" in bench.output()


def test_cancelled_or_preempted_it_saves_and_leaves_the_rest_to_slurm(bench):
    assert signalled(bench, signal.SIGTERM) == 42
    assert len(bench.calls()) == 1


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, "0,1,2,3"),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "4"}, "unset"),
        ({}, "unset"),
    ],
)
def test_one_process_takes_all_gpus_of_its_node(bench, environment, devices):
    bench.steps("0")
    assert bench.run("slurm.sbatch", *ARGS, **environment) == 0
    assert (bench.directory / "devices").read_text().split() == [devices]


def test_dry_run_and_wrong_usage_call_nothing(bench):
    assert bench.run("slurm.sbatch", "--dry-run", *ARGS) == 0
    assert shlex.split(bench.output())[-5:] == ["-m", "xlformer", "train", *ARGS]
    for args, more, words in [
        (ARGS[1:], {}, "--workdir=DIR is missing"),
        (["bench", *ARGS], {}, "bench: none of train, evaluate, generate"),
        ([*ARGS, "--max_restarts=x"], {}, "--max_restarts=x"),
        (ARGS, {"SLURM_JOB_ID": ""}, "this is a job: sbatch"),
        (ARGS, {"PYTHON": "/no/python"}, "no /no/python"),
        (ARGS, {"SLURM_SUBMIT_DIR": "/"}, "is not the repository"),
    ]:
        assert bench.run("slurm.sbatch", *args, **more) == 2
        assert words in bench.output() and bench.output().count("\n") == 1
    assert bench.calls() == []


def test_what_sbatch_reads(bench):
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    # After the first other line sbatch reads no more of them.
    head = lines[1 : 1 + sum(line.startswith("#SBATCH ") for line in lines)]
    flags = {line.removeprefix("#SBATCH ") for line in head}
    assert flags >= {"--requeue", "--ntasks-per-node=1", "--signal=B:USR1@120"}
