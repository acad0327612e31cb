"""Checkpoints that several files of tests damage, each its own copy."""

import shutil

import pytest
from checkpoint_states import save_all


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Steps 1 and 2, to be copied."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_all(directory, [1, 2], {1: 2.0, 2: 1.0})
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")
