"""A store that does not answer: no bad input, but worth another try."""

import counted
import pytest

from xlformer import config, storage
from xlformer.data import prepared, recipes
from xlformer.errors import UserError, WorthAnotherTry


@pytest.mark.parametrize(
    "error, kind",
    [(RuntimeError("503"), WorthAnotherTry), (FileNotFoundError("gone"), UserError)],
)
@pytest.mark.parametrize(
    "fields",
    [
        {"corpus": "text", "path": "PLACE"},
        {"corpus": "stdlib", "tokenizer": "PLACE"},
        {"corpus": "trembl", "manual_dir": "PLACE"},
        {"corpus": "lm1b", "manual_dir": "PLACE"},
        {"corpus": "lm1b", "vocab_file": "PLACE"},
        {},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_what_a_store_does_not_give_is_worth_another_try(
    fields, error, kind, monkeypatch
):
    """Wherever a person may name a place in one."""

    class Path:
        def __init__(self, place):
            self._place = place

        def __fspath__(self):
            return self._place

        def __getattr__(self, name):
            raise error

    monkeypatch.setattr(storage, "path", Path)
    place = "gs://bucket/one"
    data = config.default_config().data
    data.update({k: place if v == "PLACE" else v for k, v in fields.items()})
    with pytest.raises(UserError, match=f"{place}: .*{error}") as caught:
        if fields:
            recipes.recipe(data)
        else:
            prepared.open_text(counted.bytes([b"a"]), place)
    assert type(caught.value) is kind
