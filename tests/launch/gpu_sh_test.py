"""launch/gpu.sh on fakes: sections, limits, failures, bad input; one real rehearsal."""

import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from fake_commands import ROOT, executable

# Has jax; has ml_collections if HAS says so or a wheel of it is on the path. Writes
# down what else it is asked to run, and fails for what FAILS names.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$1 ${2:-}" in
    "- jax") exit "${WITHOUT_JAX:-0}" ;;
    "-c import ml_collections") [[ -n ${HAS:-} || $PYTHONPATH == *.whl ]] || exit 1 ;;
    "-c import sys"*) echo 3.12 ;;
    "-m pip") echo "$*" >>"$FAKE_LOG" ;;
    *)
        echo "$*" >>"$FAKE_LOG"
        echo "a table of ${1##*/}"
        [[ -z ${FAILS:-} || $* != *"$FAILS"* ]] || { echo "it broke" >&2; exit 3; }
        ;;
esac
"""
FAKE_GIT = """#!/usr/bin/env bash
echo "git $*" >>"$FAKE_LOG"
"""
WITH_GPU = """#!/usr/bin/env bash
echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"
"""
SECTIONS = "device kernels bench sweep wt103_train wt103_infer enwik8".split()


@pytest.fixture
def gpu(tmp_path):
    """gpu(*arguments, **environment) runs the script of a checkout on fakes."""
    root, fakes = tmp_path / "a checkout", tmp_path / "fakes"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "peers").mkdir()
    (root / "xlformer").mkdir()
    shutil.copy(ROOT / "xlformer/errors.py", root / "xlformer")  # the exit codes
    python = executable(tmp_path / "python", FAKE_PYTHON)
    executable(fakes / "git", FAKE_GIT)
    executable(fakes / "nvidia-smi", WITH_GPU)
    (tmp_path / "log").touch()
    base = {"PATH": f"{fakes}:/usr/bin:/bin", "FAKE_LOG": str(tmp_path / "log")}
    base |= {"PYTHON": str(python), "HAS": "yes", "HOME": str(tmp_path)}

    def run(*arguments, **environment):
        return subprocess.run(
            ["bash", str(root / "launch/gpu.sh"), *arguments],
            env=base | environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
        )

    run.root, run.fakes, run.log = root, fakes, tmp_path / "log"
    return run


def test_all_sections_run_within_25_minutes_and_each_within_10(
    gpu, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(ROOT / "tests/peers"))
    settings = importlib.import_module("settings")
    done = gpu(f"--out={tmp_path / 'o u t'}")
    assert done.returncode == 0, done.stderr
    limits = dict(re.findall(r"^(\w+): at most (\d+) s", done.stderr, re.M))
    assert sum(map(int, limits.values())) <= 25 * 60
    assert max(map(int, limits.values())) <= 10 * 60
    assert sum(int(n) for k, n in limits.items() if k.startswith("bench")) <= 10 * 60
    calls = gpu.log.read_text()
    for name in (
        "--preset=enwik8",
        "--preset=nvidia_train",
        "--preset=nvidia_inference",
    ):
        assert name in calls
    assert "--compare=attention:pallas_gpu,blocked,xla" in calls
    named = re.findall(r"--settings=(\S+)", calls)
    expected = {n for n, setting in settings.SETTINGS.items() if setting.gpu}
    assert set(",".join(named).split(",")) == expected
    assert f"--plot={tmp_path / 'o u t'}/sweep.svg" in calls
    summary = (tmp_path / "o u t/summary.md").read_text()
    found = re.findall(r"^## (\w+): ok", summary, re.M)
    assert found == list(limits) and len(found) == 9
    assert "a table of compare.py" in summary and "Rehearsal" not in summary


def test_a_comparison_ends_itself_before_it_is_ended(gpu, tmp_path):
    """So that what it has measured by then is in its table."""
    done = gpu(f"--out={tmp_path / 'out'}")
    steps = re.findall(r"^\w+: at most (\d+) s: .*--limit=(\d+)", done.stderr, re.M)
    assert len(steps) == 3
    assert all(0 < int(inner) < int(outer) for outer, inner in steps)


def test_a_step_that_fails_stops_no_other_and_a_later_call_adds_to_the_page(
    gpu, tmp_path
):
    out = f"--out={tmp_path / 'out'}"
    done = gpu(out, "--only=kernels,sweep", FAILS="check_kernels")
    assert done.returncode == 0 and "kernels: FAILED, exit code 3" in done.stderr
    gpu(out, "--only=device")
    summary = (tmp_path / "out/summary.md").read_text()
    assert re.findall(r"^## (\w+)", summary, re.M) == ["device", "kernels", "sweep"]
    assert "Last line of its log: it broke" in summary
    assert gpu.log.read_text().count("check_kernels") == 1


def test_a_wheel_beside_the_peers_stands_in_for_ml_collections(gpu):
    missing = gpu("--only=device", HAS="")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert "ml_collections" in missing.stderr and "--prepare" in missing.stderr
    (gpu.root / "peers/ml_collections-1.1.0-py3-none-any.whl").touch()
    assert gpu("--only=device", HAS="").returncode == 0


def test_prepare_takes_the_pinned_commits_and_measures_nothing(gpu):
    assert gpu("--prepare").returncode == 0
    calls = gpu.log.read_text()
    assert "44781ed21dbaec88b280f74d9ae2877f52b492a5" in calls
    assert "729963dd47e7c8bd462ad10bfac7a7b0b604e6dd" in calls
    assert "1d466ec5875675ca6b6f0caacbb741240a29da9e" in calls
    assert "pip download" in calls and "compare.py" not in calls
    (gpu.root / "peers/transformer-xl").mkdir()
    assert "transformer-xl is no clone" in gpu("--prepare").stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--fast"], {}, "--fast"),
        (["--only=sweeep"], {}, "sweeep"),
        (["--out="], {}, "--out="),
        (["--only=device"], {"WITHOUT_JAX": "1"}, "jax, flax, optax"),
        (["--only=device"], {"PATH": "/usr/bin:/bin"}, "--rehearse"),
    ],
)
def test_bad_input_is_one_line(gpu, arguments, environment, words):
    if "WITHOUT_JAX" in environment:  # of no Python here
        for name in ("python3", "python"):
            executable(gpu.fakes / name, FAKE_PYTHON)
    done = gpu(*arguments, **environment)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and gpu.log.read_text() == ""


def test_a_driver_without_a_gpu_is_no_gpu(gpu):
    executable(gpu.fakes / "nvidia-smi", "#!/usr/bin/env bash\nexit 9\n")
    done = gpu()
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_help_names_all_sections(gpu):
    done = gpu("--help")
    assert done.returncode == 0 and done.stdout.startswith("usage:")
    assert all(f"  {name} " in done.stdout for name in SECTIONS)


def test_a_rehearsal_needs_no_gpu(tmp_path):
    """The real script and the real Python: the cheapest section."""
    done = subprocess.run(
        ["bash", "launch/gpu.sh", "--rehearse", "--only=device", f"--out={tmp_path}"],
        env=os.environ | {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    summary = (tmp_path / "summary.md").read_text()
    assert "A rehearsal: the numbers mean nothing" in summary
    assert "## device: ok" in summary and "jax " in summary, summary
