"""The programs in examples/ run. (models/own_model_test.py has the model in there.)"""

import re

import copy_task
import numpy as np
import pytest

from xlformer import models

SMALL = ["--steps=2", "--rows=4", "--length=3", "--test_length=5"]


@pytest.mark.parametrize("name", list(models.MODELS))
def test_copying_is_learnt_and_tested_with_every_model(name, capsys):
    assert copy_task.main([*SMALL, f"--model={name}"]) == 0
    about, head, short, long = capsys.readouterr().out.splitlines()
    parameters = re.search(r"^(\w+), ([\d,]+) parameters, 2 steps: loss \d", about)
    assert parameters[1] == name
    # Equal enough to be compared.
    assert 95_000 < int(parameters[2].replace(",", "")) < 115_000
    assert head.split() == ["length", "characters", "sequences"]
    assert [line.split()[0] for line in (short, long)] == ["3", "5"]


def test_a_sequence_is_copied_wherever_it_stands():
    rng = np.random.default_rng(0)
    batch, weights_BT = copy_task.sequences(rng, [3, 2, 5], 11, anywhere=True)
    starts = []
    for row, n in enumerate([3, 2, 5]):
        end, begin = batch["lengths_B"][row], batch["resets_BT"][row]
        start = int(end - 2 * n - 1)
        # At the beginning of a row there is nothing to forget.
        assert np.flatnonzero(begin).tolist() == ([start] if start else [])
        inputs_T, targets_T = batch["inputs_BT"][row], batch["targets_BT"][row]
        digits = inputs_T[start : start + n].tolist()
        assert inputs_T[start + n] == copy_task.SEPARATOR and max(digits) < 10
        scored = targets_T[weights_BT[row] > 0].tolist()
        assert scored == [*digits, copy_task.END]
        starts.append(start)
    assert len(set(starts)) > 1
    batch, _ = copy_task.sequences(rng, [3, 2], 11, anywhere=False)
    assert batch["resets_BT"] is None and batch["lengths_B"].tolist() == [7, 5]


def test_a_sequence_is_right_where_all_of_it_is(monkeypatch):
    weights_BT = np.array([[0, 1, 1, 0], [0, 1, 1, 0]])
    right_BT = np.array([[False, True, True, False], [True, True, False, True]])
    monkeypatch.setattr(copy_task, "right", lambda *_: right_BT)
    assert copy_task.accuracies(None, None, None, weights_BT) == (0.75, 0.5)


def test_what_cannot_be_built_is_one_line(capsys):
    assert copy_task.main([*SMALL, "--config.model.d_modle=3"]) == 2
    assert "did you mean 'd_model'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--steps=0", "--steps=0 must be at least 1"),
        ("--length=-1", "--length=-1 must be at least 1"),
        ("--rate=nan", "--rate=nan must be a finite number"),
        ("--test_length=2", "--test_length=2 is less than --length=3"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(flag, line, capsys):
    assert copy_task.main([*SMALL, flag]) == 2
    assert line in capsys.readouterr().err
