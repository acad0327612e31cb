"""A model of one's own, which knows nothing but the contract."""

import dataclasses
import pathlib
import types

import jax
import numpy as np
import own_model
import pytest

from xlformer import models, testing
from xlformer.errors import UserError
from xlformer.models import own
from xlformer.models.parameters import abstract_params

ROOT = pathlib.Path(__file__).parent.parent.parent
MODEL = own_model.Gated(own_model.Config(vocab_size=19, width=3, dropout=0.1))
DEFINED = {"init", "init_state", "state_axes", "apply", "log_probs", "_forward"}


class Ahead(models.Model):
    causal = False


def test_it_keeps_the_contract_and_defines_five_functions():
    testing.check_model(MODEL)
    found = {n for n, x in vars(own_model.Gated).items() if callable(x)}
    assert {name for name in found if not name.startswith("__")} == DEFINED


def test_the_page_about_it_shows_all_of_it():
    code = (ROOT / "examples" / "own_model.py").read_text()
    assert len(code.splitlines()) <= 70
    assert f"```python\n{code}```" in (ROOT / "docs" / "own_model.md").read_text()


def test_what_others_ask_has_a_default():
    assert MODEL.vocab_size == 19 and MODEL.causal and MODEL.needs_rngs
    assert MODEL.memory_length is MODEL.replay(7) is MODEL.trunk is MODEL.width is None
    assert MODEL.flops(batch_size=2, segment_length=3) is None
    assert MODEL.card() == {"memory_length": None, "extended_length": 0}
    assert MODEL.segments_equal_one_pass and not Ahead(None).segments_equal_one_pass
    assert MODEL.for_generation() is MODEL
    assert MODEL.check_mesh(types.SimpleNamespace(shape={"tensor": 7})) is None
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    assert MODEL.dtype(params) == np.float32 and MODEL.dtype({}) is None
    assert MODEL.param_axes(params)["table_VD"] == (None, None)


def test_init_is_traced_once_for_equal_models():
    traced = []

    class Traced(own_model.Gated):
        def init(self, key):
            traced.append(self.config)
            return super().init(key)

    other = dataclasses.replace(MODEL.config, width=5)
    shapes = [abstract_params(Traced(c)) for c in (MODEL.config, other, MODEL.config)]
    assert traced == [MODEL.config, other]
    first, wider, again = (shape["table_VD"].shape for shape in shapes)
    assert first == again == (19, 3) and wider == (19, 5)
    # What one changes is not what another one finds.
    whole = dict(shapes[0])
    shapes[0].clear()
    assert abstract_params(Traced(MODEL.config)) == whole


def test_reading_changes_only_fields_that_there_are():
    assert MODEL.for_reading(memory_length=-1, clamp_length=None) is MODEL
    assert MODEL.for_reading(width=5).config == dataclasses.replace(
        MODEL.config, width=5
    )
    with pytest.raises(UserError, match="^clamp_length=3: Gated has no clamp_length$"):
        MODEL.for_reading(width=5, clamp_length=3, window=2)


def test_what_cannot_generate_says_so():
    class Silent(own_model.Gated):
        log_probs = models.Model.log_probs

    class Forgetful(own_model.Gated):
        memory_length = 0

    with pytest.raises(UserError, match="Silent has no log_probs: it cannot generate"):
        Silent(MODEL.config).log_probs({}, np.zeros((1, 1), int), None)
    with pytest.raises(UserError, match="a memory of 0 carries nothing from token"):
        Forgetful(MODEL.config).for_generation()


def changed(config=MODEL.config, **defined):
    return type("Other", (own_model.Gated,), defined)(config)


@dataclasses.dataclass
class Thawed:
    vocab_size: int = 19
    width: int = 3


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (own_model.Gated, "model is the class Gated, not an object of a subclass of"),
        (MODEL.config, "model is Config(vocab_size=19, "),
        (changed(apply=models.Model.apply), "Other does not define apply, which"),
        (changed(init=models.Model.init), "Other does not define init, which"),
        (changed(Thawed()), "Other has a config that is not hashable: "),
        (changed(("a tuple",)), "no frozen dataclass but a tuple"),
        (changed(own_model.Config(None)), "Other has vocab_size=None, not a number"),
        (changed(state_axes=lambda _: None), "state_axes() says None of an array"),
        (changed(state_axes=lambda _: {"h": ()}), "state_axes() says {'h': ()} of"),
        (changed(state_axes=lambda _: ("batch",)), "says ('batch',) of an array that"),
        (changed(state_axes=lambda _: (None, "batch")), "that of the rows is 'batch'"),
        (changed(init_state=lambda *_: {"h": 0.0}), "where init_state gives PyTreeDef"),
    ],
)
def test_what_is_no_whole_model_is_said_before_anything_is_compiled(model, line):
    with pytest.raises(UserError) as raised:
        own.check(model)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_whole_model_is_not_objected_to():
    own.check(MODEL)
    own.check(changed(init_state=lambda *_: (), state_axes=lambda _: ()))


def test_its_config_alone_builds_nothing():
    with pytest.raises(UserError, match="Config, which belongs to no model .* its cl"):
        models.build(MODEL.config)

    @dataclasses.dataclass(frozen=True)
    class TransformerConfig:
        vocab_size: int = 3

    with pytest.raises(UserError, match="did you mean 'TransformerXLConfig'?"):
        models.build(TransformerConfig())
