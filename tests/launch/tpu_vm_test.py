"""launch/tpu_vm.sh and worker.sh against a gcloud whose hosts are directories."""

import os
import pathlib
import shlex
import signal

import pytest
from fake_commands import ROOT, Bench

# A slice is the file `state`: each look takes a line, the last one stays. Its hosts are
# the directories host-0 and host-1, where ssh runs the command for real, in parallel.
GCLOUD = r"""
note "$@"
missing() { echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; }
case "$3 $4" in
    "queued-resources create")
        rm -rf "$FAKE"/host-*
        mkdir "$FAKE"/host-{0,1}
        printf '%s\n' ${FAKE_STATES:-WAITING_FOR_RESOURCES PROVISIONING ACTIVE} \
            >"$FAKE/state"
        ;;
    "queued-resources describe")
        [[ -f $FAKE/state ]] || missing
        head -n 1 "$FAKE/state"
        [[ $(wc -l <"$FAKE/state") -eq 1 ]] || sed -i 1d "$FAKE/state"
        ;;
    "queued-resources delete")
        [[ -f $FAKE/state ]] || missing
        [[ -z ${FAKE_DENIED:-} ]] || { echo "ERROR: PERMISSION_DENIED" >&2; exit 1; }
        rm "$FAKE/state"
        ;;
    "tpu-vm describe") echo "${FAKE_TPU_VM:-READY}" ;;
    "tpu-vm scp") for host in "$FAKE"/host-*; do cp "$5" "$host/${6#*:}"; done ;;
    "tpu-vm ssh")
        for argument in "$@"; do
            [[ $argument != --command=* ]] || command=${argument#*=}
        done
        children=() status=0
        for host in "$FAKE"/host-*; do
            (cd "$host" && HOME=$host exec bash -c "$command") &
            children+=("$!")
        done
        for child in "${children[@]}"; do wait "$child" || status=$?; done
        exit "$status"
        ;;
    *) exit 9 ;;
esac
"""
HOSTNAME = 'basename "$HOME"'
# Every Python of the hosts. `behave` is what training does there.
PYTHON = r"""
case "$1 ${2:-}" in
    "-c import sys"*) echo 3.12 ;;
    "--version "*) echo "Python 3.12.0" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") [[ ${3:-} == --version ]] || printf '%s\n' "$*" >>"$FAKE/pip" ;;
    "-m xlformer")
        host=$(hostname)
        attempt=$(cat "$FAKE/train-$host" 2>/dev/null | wc -l)
        printf '%q ' "$@" >>"$FAKE/train-$host"
        echo >>"$FAKE/train-$host"
        source "$FAKE/behave"
        ;;
esac
"""
ARGS = [
    "--name=slice",
    "--zone=here-1",
    "--accelerator=v5litepod-16",
    "--workdir=gs://bucket/run",
    "--config=wt103_base",
]


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path, gcloud=GCLOUD, hostname=HOSTNAME, python3=PYTHON)
    bench.environment.pop("PYTHON", None)
    bench.behave = (tmp_path / "behave").write_text
    bench.behave("exit 0")
    yield bench
    bench.end()


def verbs(bench):
    """'create', 'describe', ...; of ssh what worker.sh is asked for."""
    found = []
    for call in bench.calls():
        verb = call[4]
        if verb == "ssh":
            command = next(a for a in call if a.startswith("--command="))
            verb = command.split("worker.sh ")[1].split()[0]
        if verb != "describe":
            found.append(verb)
    return found


def trained(bench, host):
    path = bench.directory / f"train-host-{host}"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def environment():
    """As tests/run.sh --aot leaves one of 1 GB beside .venv."""
    made = ROOT / ".venv-tpu"
    mine = not made.exists()
    made.mkdir(exist_ok=True)
    yield made.name
    if mine:
        made.rmdir()


def test_the_whole_story(bench, environment):
    odd = "--config.data.path=a  b 'c' \"d\" $HOME `x` \\ *;é"
    assert bench.run("tpu_vm.sh", *ARGS, "--spot", "--project=p", odd) == 0
    assert verbs(bench) == ["create", "scp", "install", "start", "delete"]
    create = next(c for c in bench.calls() if c[4] == "create")
    assert create[5:] == [
        "slice",
        "--node-id=slice",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
        "--zone=here-1",
        "--project=p",
    ]
    delete = bench.calls()[-1]
    assert delete[3:8] == ["queued-resources", "delete", "slice", "--force", "--quiet"]
    # Every host got the same words, whatever is in them.
    expected = ["-m", "xlformer", "train", *ARGS[3:], odd]
    for host in 0, 1:
        (line,) = trained(bench, host)
        assert shlex.split(line) == expected
    assert (bench.directory / "pip").read_text().count("[tpu,gcs]") == 2
    copied = bench.directory / "host-1" / "xlformer"
    there = ["xlformer/train.py", "configs", "launch/worker.sh", "setup.py"]
    assert all((copied / name).exists() for name in there)
    assert not any((copied / name).exists() for name in [".git", "runs", ".jax_cache"])
    assert not (copied / environment).exists()


def test_another_command_runs_on_every_host_too(bench):
    args = ["evaluate", *ARGS[:4], "--split=test", "--warmup=exact"]
    assert bench.run("tpu_vm.sh", *args) == 0, bench.output()
    assert verbs(bench) == ["create", "scp", "install", "start", "delete"]
    for host in 0, 1:
        (line,) = trained(bench, host)
        words = ["evaluate", ARGS[3], "--split=test", "--warmup=exact"]
        assert shlex.split(line) == ["-m", "xlformer", *words]


def test_a_failing_host_ends_the_others_and_all_start_again(bench):
    bench.behave("""
        [[ $attempt -eq 0 ]] || exit 0
        [[ $host == host-0 ]] || exit 134
        echo $$ >"$FAKE/hanging"
        while :; do sleep 0.1; done  # hangs in a collective
    """)
    assert bench.run("tpu_vm.sh", *ARGS) == 0
    assert verbs(bench)[3:] == ["start", "stop", "start", "delete"]
    assert len(trained(bench, 0)) == len(trained(bench, 1)) == 2
    assert "host host-1 failed with exit code 134" in bench.output()
    assert "restart 1 of 10" in bench.output()
    pid = (bench.directory / "hanging").read_text().strip()
    assert not pathlib.Path(f"/proc/{pid}").exists()


def test_a_preempted_slice_is_made_again(bench):
    bench.behave("""
        [[ $attempt -eq 0 ]] || exit 0
        echo SUSPENDED >"$FAKE/state"
        kill -9 $PPID  # the connection goes too
    """)
    assert bench.run("tpu_vm.sh", *ARGS, "--spot") == 0
    made = ["create", "scp", "install", "start"]
    assert verbs(bench) == [*made, "delete", *made, "delete"]
    assert "preempted" in bench.output()


@pytest.mark.parametrize(
    ("code", "starts"), [("2", 1), ("42", 3), ("1", 3)], ids=["bad", "saved", "crash"]
)
def test_what_is_restarted_and_the_limit(bench, code, starts):
    bench.behave(f"exit {code}")
    assert bench.run("tpu_vm.sh", *ARGS, "--max_restarts=2") == int(code)
    assert len(trained(bench, 0)) == starts
    assert verbs(bench)[-1] == "delete"


def test_a_signal_saves_on_every_host_and_deletes(bench):
    bench.behave("""
        trap 'touch "$FAKE/saved-$host"; exit 42' TERM
        touch "$FAKE/ready-$host"
        while :; do sleep 0.05; done
    """)
    process = bench.start("tpu_vm.sh", *ARGS)
    try:
        bench.until(lambda: len(list(bench.directory.glob("ready-*"))) == 2)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 42, bench.output()
    finally:
        process.kill()
    assert len(list(bench.directory.glob("saved-*"))) == 2
    assert verbs(bench)[-3:] == ["start", "stop", "delete"]
    assert len(trained(bench, 0)) == 1


def test_kept_slices_are_named_with_the_command_that_deletes_them(bench):
    assert bench.run("tpu_vm.sh", *ARGS, "--keep") == 0
    assert "delete" not in verbs(bench)
    assert "delete --name=slice --zone=here-1" in bench.output()
    assert "billed" in bench.output()


def test_a_slice_that_cannot_be_deleted_is_named(bench):
    assert bench.run("tpu_vm.sh", *ARGS, FAKE_DENIED="yes") == 0
    assert "PERMISSION_DENIED" in bench.output()
    assert "MAY STILL RUN" in bench.output()


def test_a_signal_while_waiting_for_the_slice_deletes_the_request(bench):
    process = bench.start("tpu_vm.sh", *ARGS, FAKE_STATES="WAITING_FOR_RESOURCES")
    try:
        bench.until(lambda: "waiting for the slice" in bench.output())
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 42, bench.output()
    finally:
        process.kill()
    assert verbs(bench) == ["create", "delete"]


def test_existing_slices_are_neither_made_nor_deleted(bench):
    for host in "host-0", "host-1":
        (bench.directory / host).mkdir()
    args = [a for a in ARGS if not a.startswith("--acc")]
    assert bench.run("tpu_vm.sh", *args, "--existing") == 0
    assert verbs(bench) == ["scp", "install", "start"]


def test_a_slice_that_never_comes_is_given_up_and_deleted(bench):
    states = {"FAKE_STATES": "WAITING_FOR_RESOURCES"}
    assert bench.run("tpu_vm.sh", *ARGS, "--wait_minutes=0", **states) == 1
    assert verbs(bench) == ["create", "delete"]
    assert "--wait_minutes=0" in bench.output()


def test_a_repeated_command_does_not_train_beside_the_first(bench):
    home = pathlib.Path(bench.environment["HOME"])
    (home / ".xlformer" / "attempt-7").mkdir(parents=True)
    assert bench.run("worker.sh", "start", "7", "--config=x") == 255
    assert "ended with 255" in bench.output() and not trained(bench, "home")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([*ARGS[:3], ARGS[4], "--workdir=runs/x"], "v5litepod-16 need one directory"),
        ([*ARGS, "--accelerator=v6e-8", "--workdir=runs/x"], "deleted at the end"),
        (ARGS[1:], "--name=NAME is missing"),
        (ARGS[:-1], "--config=NAME is missing"),
        ([*ARGS, "--spott"], "--spott: unknown"),
        ([*ARGS, "--spilt=test"], "--spilt=test: unknown"),
        ([*ARGS, "--accelerator=v99-16"], "--runtime=VERSION is missing"),
    ],
)
def test_wrong_usage_is_one_line_before_anything_is_made(bench, args, words):
    assert bench.run("tpu_vm.sh", *args) == 2
    assert words in bench.output() and bench.output().count("\n") == 1
    assert bench.calls() == []


def test_dry_run_shows_every_command_and_calls_none(bench):
    assert bench.run("tpu_vm.sh", *ARGS, "--dry-run") == 0
    assert bench.calls() == []
    shown = [line for line in bench.output().splitlines() if line.startswith("+ ")]
    words = ["create", "tar", "scp", "install", "start", "delete"]
    assert len(shown) == len(words)
    assert all(word in line for word, line in zip(words, shown, strict=True))
