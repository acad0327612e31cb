"""Files of torch.save, read by us and by torch.load: the same numbers and dtypes."""

import numpy as np
import pytest
import torch

from xlformer.convert.files import read_state

pytestmark = pytest.mark.filterwarnings("default")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64]
DTYPES += [torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
VIEWS = [
    lambda x: x.transpose(0, -1) if x.dim() > 1 else x,
    lambda x: x[1:] if x.dim() else x,
    lambda x: x[::2] if x.dim() else x,
    lambda x: x.unsqueeze(0),
    lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x,
]


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_what_torch_loads(zipped, tmp_path):
    draw = np.random.default_rng(int(zipped))
    for i in range(50):
        state = torch.nn.BatchNorm1d(3).state_dict() if i % 2 else {}
        for j in range(draw.integers(1, 7)):
            shape = draw.integers(0, 5, size=draw.integers(0, 4)).tolist()
            x = torch.from_numpy(np.asarray(draw.normal(size=shape) * 9))
            x = state[f"{j}"] = x.to(DTYPES[draw.integers(len(DTYPES))])
            for _ in range(draw.integers(0, 3)):
                x = VIEWS[draw.integers(len(VIEWS))](x)
            state[f"tied.{j}"] = x
        path = tmp_path / f"{i}.pt"
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        found, expected = read_state(path)[0], torch.load(path, weights_only=True)
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            narrow = x.dtype in (torch.float16, torch.bfloat16)
            x = (x.float() if narrow else x).detach().numpy()
            assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
            np.testing.assert_array_equal(found[name], x)
