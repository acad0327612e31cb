"""To the original and back; that the numbers agree shows golden/check_test.py."""

import golden_weights
import jax
import numpy as np
import pytest

from xlformer import convert, models
from xlformer.errors import UserError

CASES = sorted(p.name for p in golden_weights.FOLDER.glob("attn*.npz"))


@pytest.mark.parametrize("name", CASES)
def test_to_original_is_the_inverse(name):
    state, hparams = golden_weights.read(name)
    config, params = convert.from_original(state, hparams)
    back = convert.to_original(config, params)
    assert set(back) == set(state)
    for key, expected in state.items():
        np.testing.assert_array_equal(back[key], expected, err_msg=key)


def test_a_model_that_the_original_lacks_is_refused():
    config = models.TransformerXLConfig(
        vocab_size=7, n_layer=1, d_model=4, n_head=2, d_head=2, d_inner=5,
        positions="rotary",
    )  # fmt: skip
    model = models.build(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(UserError, match="config.model.positions='rotary'"):
        convert.to_original(config, params)
