"""Tasks of one's own, scored by lm-evaluation-harness with no network."""

import json
import math
import os
import socket
import tempfile

import harness_runs
import pytest
import trained_run

pytest.importorskip("lm_eval")
# Read when what it needs is imported, by its first use.
HOME = tempfile.TemporaryDirectory(prefix="xlformer-harness-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": HOME.name}

from xlformer.errors import UserError  # noqa: E402
from xlformer.harness import Answerer, __main__  # noqa: E402

# Of the libraries that it uses; here they are errors.
pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "until": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DOCUMENTS = {
    "choice": [
        {"text": "the naïve", "choices": ["café", "17 x²", "б"], "answer": 0},
        {"text": "", "choices": ["the", "x"], "answer": 1},
    ],
    "rolling": [{"text": trained_run.TEXT * 2}, {"text": "déjà vu"}],
    "until": [{"text": "the naïve"}, {"text": ""}],
}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder of tasks, on a machine without a network."""

    def connect(*args):
        raise AssertionError("the network is asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, task in TASKS.items():
        lines = map(json.dumps, DOCUMENTS[name])
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        files = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        about = {"task": f"mine_{name}", "dataset_path": "json", "test_split": "test"}
        # JSON is YAML, too.
        text = json.dumps(about | {"dataset_kwargs": files} | task)
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_tasks_are_scored_and_the_scores_are_ours(base, tasks, tmp_path, capsys):
    workdir, out = trained_run.trained(base), tmp_path / "out"
    flags = ["--tasks=mine_choice,mine_rolling,mine_until", f"--include_path={tasks}"]
    flags += [f"--output_path={out}", "--log_samples"]
    flags += ["--model_args", f"workdir={workdir},checkpoint=latest"]
    assert __main__.main(flags) == 0
    assert "mine_rolling" in capsys.readouterr().out
    (path,) = out.rglob("results_*.json")
    found = json.loads(path.read_text())
    assert found["config"]["step"] == trained_run.STEPS[-1]
    one = Answerer.open(workdir=str(workdir), checkpoint="latest")

    texts = [d["text"] for d in DOCUMENTS["rolling"]]
    nats = one.loglikelihood_rolling(harness_runs.requests(*((t,) for t in texts)))
    size = len("".join(texts).encode())
    bits = found["results"]["mine_rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(-sum(nats) / size / math.log(2))

    right = 0
    for document in DOCUMENTS["choice"]:
        # The program puts a space between the two.
        pairs = [(document["text"], f" {choice}") for choice in document["choices"]]
        scores = [a for a, _ in one.loglikelihood(harness_runs.requests(*pairs))]
        right += scores.index(max(scores)) == document["answer"]
    assert found["results"]["mine_choice"]["acc,none"] == right / 2

    how = TASKS["until"]["generation_kwargs"]
    asked = harness_runs.requests(*((d["text"], how) for d in DOCUMENTS["until"]))
    (path,) = out.rglob("samples_mine_until_*.jsonl")
    lines = map(json.loads, path.read_text().splitlines())
    said = {line["doc_id"]: line["resps"][0][0] for line in lines}
    assert [said[0], said[1]] == one.generate_until(asked)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--tasks=nosuch", "lm_eval: Tasks not found: nosuch"),
        ("--model_args workdir=x", "lm_eval: No tasks specified"),
        ("--tasks=mine_choice --model_args a=1", "model_args: no argument a=1"),
    ],
)
def test_what_cannot_be_is_one_line(flags, line, tasks, capsys):
    assert __main__.main([f"--include_path={tasks}", *flags.split()]) == 2
    (said,) = [x for x in capsys.readouterr().err.splitlines() if x[:6] == "error:"]
    assert line in said


def test_what_the_program_adds_gives_way_to_what_was_said(base):
    from xlformer.harness.model import XLFormer

    given = {"workdir": str(trained_run.trained(base)), "batch_size": 2}
    added = {"batch_size": "auto", "max_batch_size": None, "device": "cuda:0"}
    one = XLFormer.create_from_arg_obj(given, added)
    assert one.get_model_info()["batch_rows"] == 2
    assert one.tok_encode("the", add_special_tokens=False) == one.tok_encode("the")
    assert one.chat_template(False) == ""
    with pytest.raises(UserError, match="no chat template to apply"):
        one.chat_template(True)
