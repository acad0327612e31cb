"""launch/gke.sh and gke.yaml: the JobSet against schemas, the script with a kubectl."""

import copy

import kubernetes_validate
import pytest
import yaml
from fake_commands import Bench, launch_files

# `states` has what the JobSet is at each look; the last one stays.
KUBECTL = r"""
note "$@"
[[ $1 != --namespace=* ]] || shift
case "$1 $2" in
    "apply -f") cat >"$FAKE/applied" ;;
    "get jobset")
        if [[ $* == *message* ]]; then echo "host 0 failed"; exit; fi
        head -n 1 "$FAKE/states"
        [[ $(wc -l <"$FAKE/states") -eq 1 ]] || sed -i 1d "$FAKE/states"
        ;;
    "get pods") [[ ! -f $FAKE/pod ]] || cat "$FAKE/pod" ;;
    "logs "*) echo "output of ${*: -1}" ;;
esac
"""
ODD = "--config.data.path=a  b 'c' \"d\" $(HOME) $$ \\ : # é"
ARGS = [
    "--name=run-1",
    "--image=registry/xlformer:1",
    "--accelerator=tpu-v5-lite-podslice",
    "--topology=4x4",
    "--workdir=gs://bucket/run",
    "--config=wt103_base",
]


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path, kubectl=KUBECTL)
    (tmp_path / "states").write_text("Completed\n")
    yield bench
    bench.end()


def applied(bench, *more):
    assert bench.run("gke.sh", *ARGS, *more) == 0, bench.output()
    return yaml.safe_load((bench.directory / "applied").read_text())


def validate(jobset):
    """The schema has no JobSet; the Job in it is checked as one of its own."""
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset["kind"] == "JobSet"
    spec = jobset["spec"]
    assert set(spec) <= {"replicatedJobs", "failurePolicy", "network", "suspend"}
    assert set(spec["failurePolicy"]) <= {"maxRestarts", "rules"}
    for rule in spec["failurePolicy"]["rules"]:
        assert set(rule) <= {"name", "action", "onJobFailureReasons"}
        assert rule["action"] in ("FailJobSet", "RestartJobSet")
        assert set(rule["onJobFailureReasons"]) <= {
            "BackoffLimitExceeded",
            "DeadlineExceeded",
            "PodFailurePolicy",
        }
    for replicated in spec["replicatedJobs"]:
        assert set(replicated) <= {"name", "replicas", "template"}
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": replicated["name"]},
            "spec": replicated["template"]["spec"],
        }
        version = kubernetes_validate.latest_version()
        kubernetes_validate.validate(job, version, strict=True)


def test_the_jobset_is_valid_and_says_what_the_exit_codes_mean(bench):
    jobset = applied(bench, ODD)
    validate(jobset)
    spec = jobset["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 10
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"]) == (4, 4)
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 120
    (container,) = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert container["command"] == ["python", "-m", "xlformer"]
    # Kubernetes reads $$ as $; otherwise the words are those that were given.
    given = [a.replace("$$", "$") for a in container["args"]]
    assert given == ["train", *ARGS[4:], ODD]
    assert "$$(HOME)" in container["args"][-1]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


@pytest.mark.parametrize(
    ("flags", "hosts", "chips"),
    [
        (["--topology=2x2"], 1, 4),
        (["--topology=2x4", "--chips_per_host=8"], 1, 8),
        (["--topology=1x1"], 1, 1),
        (["--topology=4x4x4"], 16, 4),
    ],
)
def test_hosts_and_chips_follow_from_the_topology(bench, flags, hosts, chips):
    job = applied(bench, *flags)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips}


def test_gpu_machines(bench):
    """What a node pool of GPUs asks for, and how the processes find each other."""
    gpus = ["--accelerator=nvidia-h100-80gb", "--gpus_per_host=8"]
    args = [a for a in ARGS if not a.startswith(("--acc", "--topology"))] + gpus
    assert bench.run("gke.sh", *args, "--hosts=3", "--spot") == 0, bench.output()
    jobset = yaml.safe_load((bench.directory / "applied").read_text())
    validate(jobset)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"]) == (3, 3)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-h100-80gb",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["tolerations"][0] == {"key": "nvidia.com/gpu", "operator": "Exists"}
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert container["args"][-3:] == [
        "--coordinator=run-1-host-0-0.run-1:8476",
        "--num_processes=3",
        "--process_id=$(HOST_INDEX)",
    ]
    (index,) = container["env"]
    path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert index["name"] == "HOST_INDEX"
    assert index["valueFrom"]["fieldRef"]["fieldPath"] == path
    # One machine has nobody to find; and machines need not be of one node pool.
    assert bench.run("gke.sh", *args) == 0
    jobset = yaml.safe_load((bench.directory / "applied").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["args"] == ["train", *ARGS[4:]]
    assert not jobset["metadata"]["annotations"]


def test_another_command_with_its_own_arguments(bench):
    args = [*ARGS[:-1], "--split=test"]
    assert bench.run("gke.sh", "evaluate", *args) == 0, bench.output()
    jobset = yaml.safe_load((bench.directory / "applied").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["args"] == ["evaluate", ARGS[4], "--split=test"]


def test_spot_selects_and_tolerates_spot_nodes(bench):
    spot = "cloud.google.com/gke-spot"
    for flags, expected in [([], False), (["--spot"], True)]:
        job = applied(bench, *flags)["spec"]["replicatedJobs"][0]["template"]["spec"]
        pod = job["template"]["spec"]
        assert (spot in pod["nodeSelector"]) == expected
        assert (spot in {t["key"] for t in pod["tolerations"]}) == expected


@pytest.mark.parametrize(
    "mistake",
    [
        lambda spec, job: job.update(backofLimit=job.pop("backoffLimit")),
        lambda spec, job: job["podFailurePolicy"]["rules"][0].pop("action"),
        lambda spec, job: job["template"]["spec"].update(nodeSelektor={}),
        lambda spec, job: job.update(completions="four"),
        lambda spec, job: spec.update(failurPolicy=spec.pop("failurePolicy")),
    ],
)
def test_mistakes_in_the_template_would_be_found(bench, mistake):
    jobset = copy.deepcopy(applied(bench))
    spec = jobset["spec"]
    mistake(spec, spec["replicatedJobs"][0]["template"]["spec"])
    with pytest.raises((kubernetes_validate.ValidationError, AssertionError, KeyError)):
        validate(jobset)


def test_a_placeholder_without_a_value_is_refused(bench, tmp_path):
    launch = launch_files(tmp_path / "checkout") / "launch"
    with (launch / "gke.yaml").open("a") as file:
        file.write("# ${COMMENTS} are not filled in\nmore: ${MORE}\n")
    assert bench.run(launch / "gke.sh", *ARGS) == 2
    assert "no value for 'MORE'" in bench.output() and bench.calls() == []


def verbs(bench):
    return [call[1] for call in bench.calls()]


def test_it_follows_host_0_through_restarts_and_deletes_when_complete(bench):
    (bench.directory / "states").write_text("\nStartup\n\nCompleted\n")
    (bench.directory / "pod").write_text("run-1-host-0-0-abc\n")
    assert bench.run("gke.sh", *ARGS, "--namespace=team") == 0
    assert all(call[1] == "--namespace=team" for call in bench.calls())
    found = [call[2] for call in bench.calls()]
    look = ["get", "get", "logs"]
    assert found == ["apply", *look, *look, *look, "get", "delete"]
    logs = [call for call in bench.calls() if call[2] == "logs"]
    # The same pod for the second time: only what came since.
    assert [any("--since" in a for a in call) for call in logs] == [False, True, True]


def test_a_failed_jobset_is_kept_and_its_message_shown(bench):
    (bench.directory / "states").write_text("\nFailed\n")
    (bench.directory / "pod").write_text("run-1-host-0-0-abc\n")
    assert bench.run("gke.sh", *ARGS) == 1
    assert "host 0 failed" in bench.output()
    assert "output of run-1-host-0-0-abc" in bench.output()
    assert "delete" not in verbs(bench)


def test_keep_follow_and_delete(bench):
    assert bench.run("gke.sh", *ARGS, "--keep") == 0
    assert "delete" not in verbs(bench)
    assert bench.run("gke.sh", "follow", "--name=run-1") == 0
    assert "delete" not in verbs(bench)
    assert bench.run("gke.sh", "delete", "--name=run-1") == 0
    assert bench.calls()[-1] == ["kubectl", "delete", "jobset", "run-1"]


def test_dry_run_prints_the_jobset_and_the_commands_and_calls_none(bench):
    assert bench.run("gke.sh", *ARGS, "--dry-run") == 0
    text, _, commands = bench.output().partition("+ kubectl")
    validate(yaml.safe_load(text))
    assert "apply -f -" in commands and "delete jobset run-1" in commands
    assert bench.calls() == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([*ARGS, "--name=Run_1"], "--name=Run_1"),
        ([*ARGS, "--workdir=/tmp/x"], "--workdir=/tmp/x"),
        ([*ARGS, "--topology=4"], "--topology=4"),
        ([*ARGS, "--chips_per_host=3"], "does not divide the 16 chips"),
        ([*ARGS, "--gpus_per_host=8"], "--topology=4x4 is of TPUs"),
        ([*ARGS, "--topology=", "--gpus_per_host=0"], "--gpus_per_host=0"),
        ([*ARGS, "--hosts=2"], "--hosts=2: those of TPUs follow"),
        ([*ARGS, "--max_restart=3"], "--max_restart=3: unknown"),
        (ARGS[:-1], "--config= is missing"),
    ],
)
def test_wrong_usage_is_one_line_and_calls_nothing(bench, args, words):
    assert bench.run("gke.sh", *args) == 2
    assert words in bench.output() and bench.output().count("\n") == 1
    assert bench.calls() == []
