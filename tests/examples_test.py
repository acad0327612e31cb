"""The programs in examples/ run. (models/own_model_test.py has the model in there.)"""

import re

import copy_task
import numpy as np
import pytest

from xlformer import models
from xlformer.instruments import sequences

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
    rng, begins = np.random.default_rng(0), []
    batch, weights_BT = copy_task.drawn(rng, [3, 2, 5] * 5, 11)
    for row, n in enumerate([3, 2, 5] * 5):
        inputs_T, targets_T = batch["inputs_BT"][row], batch["targets_BT"][row]
        begin = int(batch["lengths_B"][row]) - 2 * n - 1
        digits = inputs_T[begin : begin + n].tolist()
        assert inputs_T[begin + n] == sequences.EQUALS and max(digits) < 10
        scored = targets_T[weights_BT[row] > 0].tolist()
        assert scored == [*digits, sequences.END]
        begins.append(begin)
    # The longest has no room to begin elsewhere.
    assert set(begins[2::3]) == {0} and len(set(begins[1::3])) > 2


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
