"""Files of torch.save, damaged at random: read, or refused in a line."""

import damaged_weights
import numpy as np
import pytest
import torch

from xlformer.convert import nvidia
from xlformer.convert.files import read_state
from xlformer.errors import UserError

pytestmark = pytest.mark.filterwarnings("default")
ARRAYS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3).half()}


class Sold:
    """Sells what a file names, if it is ever called."""

    called = 0

    def __reduce__(self):
        return _sell, ()


def _sell():
    Sold.called += 1


@pytest.mark.parametrize("zipped", [True, False])
def test_damage_to_a_state_dict(zipped, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(ARRAYS, path, _use_new_zipfile_serialization=zipped)
    assert _outcomes(path, read_state, seed=int(zipped))["refused"] > 200


def test_damage_to_a_checkpoint_of_nvidias(tmp_path):
    path = tmp_path / "checkpoint_last.pt"
    hparams = {"n_token": 3, "n_layer": 1, "cutoffs": []}
    torch.save({"model_config": hparams, "model_state": ARRAYS}, path)
    assert _outcomes(path, nvidia.load, seed=3)["refused"] > 200


def _outcomes(path, read, seed):
    whole, draw = path.read_bytes(), np.random.default_rng(seed)
    found = {"read": 0, "refused": 0}
    for _ in range(500):
        path.write_bytes(damaged_weights.mutated(whole, draw))
        try:
            read(path)
            found["read"] += 1
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error), error
            found["refused"] += 1
    return found


@pytest.mark.parametrize("where", ["args", "vocab", "model_config", "model_state", "x"])
def test_what_a_checkpoint_names_is_not_called(where, tmp_path):
    whole = {"model_config": {"n_token": 3}, "model_state": ARRAYS, where: Sold()}
    torch.save(whole, tmp_path / "checkpoint_last.pt")
    with pytest.raises(UserError, match="it names .*_sell"):
        nvidia.read(tmp_path)
    assert Sold.called == 0
