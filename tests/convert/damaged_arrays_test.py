"""Arrays and settings of strangers, damaged at random: read, or refused in a line."""

import damaged_weights
import numpy as np
import pytest

CLASSES = ["npz", "npz compressed", "safetensors", "index of shards", "config.json"]


@pytest.mark.parametrize("name", CLASSES)
def test_damage_is_refused_in_a_line_or_changes_nothing(name, tmp_path):
    folder = damaged_weights.copy(name, tmp_path / "copy")
    draw = np.random.default_rng(CLASSES.index(name))
    outcomes = [damaged_weights.outcome(name, folder, draw) for _ in range(500)]
    assert outcomes.count("refused") > 200
    # What has checksums keeps its values; other formats may say something else.
    assert name not in damaged_weights.KEPT or "changed" not in outcomes
