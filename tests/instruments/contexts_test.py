"""Exact contexts: against a loop over targets, of every family; where they lie."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_run
import training_runs

from xlformer import config as config_lib
from xlformer import models
from xlformer.instruments import contexts as contexts_lib
from xlformer.models.base import Aux, Model

VOCAB = 13
CONTEXTS = [6, 12]
TOKENS = np.random.default_rng(5).integers(0, VOCAB, 61).astype(np.uint8)
PLACES = np.array([17, 23, 29, 31, 60])  # shared windows, others, and the last token
ABSOLUTE = {"attn_type": 2, "memory_length": 0}
# An epsilon so large that what later keys tell through their maximum shows.
LEAKING = {"stabiliser": "original", "feature_epsilon": 0.1, "context_length": 13}
# Of each a config, what is changed in it, and the longest context.
FAMILIES = {
    "transformer_xl": ("quickstart", {"scan_layers": True}, None),
    "without_memory": ("quickstart", {"memory_length": 0, "scan_layers": True}, None),
    "from_end": ("quickstart", {**ABSOLUTE, "scan_layers": True}, None),
    "lstm": ("lstm_small", {}, None),
    "vanilla": ("vanilla_small", {"extended_length": 4}, 11),
    "sha_rnn": ("sha_rnn_small", {}, None),
    "favor": ("performer_small", {"scan_layers": True}, None),
    "published": ("performer_small", {**LEAKING, "scan_layers": True}, 13),
    "softmax": ("performer_small:mechanism=softmax", {"scan_layers": True}, 11),
    "universal": ("universal_small", {}, None),
}


def build(name):
    config_name, fields, _ = FAMILIES[name]
    joint = "," if ":" in config_name else ":"
    config = config_lib.load(f"{config_name}{joint}debug").model
    config.update(fields)
    model = models.build(config, VOCAB)
    params = trained_run.random_params(model)
    return model, jax.tree.map(lambda x: (0.4 * x).astype(x.dtype), params)


def naive(model, params, tokens, places, context):
    """A fresh state, fed tokens[t - c : t] at once; the loss of tokens[t]."""

    @jax.jit
    def nll(inputs_BT, targets_BT):
        state = model.init_state(len(inputs_BT))
        return model.apply(params, inputs_BT, targets_BT, state, step=3)[0][:, -1]

    index_BT = np.array(places)[:, None] - context + np.arange(context)
    arrays = (tokens[index_BT], tokens[index_BT + 1])
    return np.asarray(nll(*(x.astype(np.int32) for x in arrays)))


def scored(model, params, tokens=TOKENS, places=PLACES, contexts=CONTEXTS):
    found_CN = np.full((len(contexts), len(places)), np.nan, np.float32)
    contexts_lib.score(model, params, tokens, places, contexts, found_CN, step=3)
    return found_CN


@pytest.mark.parametrize("name", FAMILIES)
def test_a_context_is_exact(name, monkeypatch):
    # Calls of two rows, of which the last one is not full.
    monkeypatch.setattr(contexts_lib, "TOKENS_PER_CALL", 25)
    model, params = build(name)
    longest = FAMILIES[name][2]
    assert contexts_lib.reader(model)[1] == longest
    found_CN = scored(model, params)
    if model.extended_length:
        model = model.for_reading(extended_length=0)
    for row, context in zip(found_CN, CONTEXTS, strict=True):
        context = min(context, longest or context)
        expected = naive(model, params, TOKENS, PLACES, context)
        np.testing.assert_allclose(row, expected, rtol=2e-5, atol=2e-5)
    # All of it is seen.
    assert not np.allclose(found_CN[0], found_CN[1], atol=1e-3)


@dataclasses.dataclass(frozen=True)
class CopyingConfig:
    vocab_size: int = 11
    distance: int = 7
    longest_segment: int | None = None
    positions_from_end: bool = False


class Copying(Model):
    """Knows the token that many places back, once it has seen so many."""

    Config = CopyingConfig

    @property
    def positions_from_end(self):
        return self.config.positions_from_end

    @property
    def longest_segment(self):
        return self.config.longest_segment

    def init(self, key):
        return {"sure": jnp.full((), 6.0)}

    def init_state(self, batch_size, dtype=None):
        # -1 is no token.
        return {"ids_BM": jnp.full((batch_size, self.config.distance - 1), -1)}

    def state_axes(self):
        return {"ids_BM": ("batch", None)}

    def apply(self, params, inputs_BT, targets_BT, state, *, lengths_B=None, **_):
        B, T = inputs_BT.shape
        ids_BS = jnp.concatenate([state["ids_BM"], inputs_BT], 1)
        logits_BTV = params["sure"] * jax.nn.one_hot(ids_BS[:, :T], self.vocab_size)
        log_p_BTV = jax.nn.log_softmax(logits_BTV)
        nll_BT = -jnp.take_along_axis(log_p_BTV, targets_BT[..., None], -1)[..., 0]
        end = T if lengths_B is None else lengths_B
        ids_BM = jax.lax.dynamic_slice_in_dim(ids_BS, end, self.config.distance - 1, 1)
        return nll_BT, {"ids_BM": ids_BM}, Aux(jnp.zeros(()), {})


def copying(**fields):
    model = Copying(CopyingConfig(**fields))
    return model, model.init(None)


def periodic(distance=7, tokens=200):
    """Random tokens, each of which comes again at this distance."""
    return np.resize(np.random.default_rng(1).integers(0, 11, distance), tokens)


@pytest.mark.parametrize("longest", [None, 4, 6])
@pytest.mark.parametrize("from_end", [False, True])
def test_a_state_without_limit_is_fed_in_parts(longest, from_end):
    model, params = copying(longest_segment=longest, positions_from_end=from_end)
    places = np.arange(20, 200, 4)
    (short, *longer) = scored(model, params, periodic(), places, [4, 8, 12, 16])
    np.testing.assert_allclose(short, np.log(11), rtol=1e-6)
    known = np.log1p(10 * np.exp(-6))
    np.testing.assert_allclose(longer, np.full((3, len(places)), known), rtol=1e-4)


def test_windows_are_shared(monkeypatch):
    fed = []
    apply = Copying.apply

    def counting(self, params, inputs_BT, *args, **options):
        fed.append(inputs_BT.shape)
        return apply(self, params, inputs_BT, *args, **options)

    monkeypatch.setattr(Copying, "apply", counting)
    targets = contexts_lib.spread(200, 40, [4, 8, 12, 16])
    scored(*copying(), periodic(), targets.places_N, [4, 8, 12, 16])
    # 40 targets in one run, with three windows more.
    assert fed == [(40 + 3, 16)]


def test_targets_are_spread_evenly():
    contexts = [4, 8, 12, 16]
    targets = contexts_lib.spread(10_000, 64, contexts)
    assert (len(targets.places_N), targets.spacing, targets.runs) == (64, 4, 2)
    assert targets.places_N[0] == 16
    steps = np.diff(targets.places_N)
    assert sorted(set(steps)) == [4, 9984 // 2 - 31 * 4]
    # The text has no room for gaps, then none for steps, then none at all.
    found = [contexts_lib.spread(276, n, contexts) for n in (64, 100, 200, 1000)]
    assert [(len(x.places_N), x.spacing) for x in found] == [
        (64, 4),
        (100, 2),
        (200, 1),
        (260, 1),
    ]
    for each in found:
        assert len(set(each.places_N)) == len(each.places_N)
        assert each.places_N.min() == 16 and each.places_N.max() <= 275
        assert list(each.places_N) == sorted(each.places_N)
    assert list(contexts_lib.spread(17, 9, contexts).places_N) == [16]


def test_a_context_lies_within_one_document():
    targets = contexts_lib.spread(100, 99, [4, 8], np.array([0, 40, 50, 57, 90]))
    expected = [*range(8, 40), *range(48, 50), *range(65, 90), *range(98, 100)]
    assert list(targets.places_N) == expected


def test_what_cannot_be_measured_is_said_in_a_line():
    refusal = training_runs.refusal
    assert "max_context=16 is longer than the text, which has 16 tokens" in refusal(
        contexts_lib.spread, 16, 9, [4, 8, 12, 16]
    )
    line = refusal(contexts_lib.spread, 99, 9, [4, 8], np.arange(0, 99, 8))
    assert "max_context=8 is longer than every document" in line
    line = refusal(contexts_lib.reader, training_runs.blanks(VOCAB))
    assert "Blanks sees what comes after a token (causal=False)" in line
    model, params = copying()
    params["sure"] = jnp.array(jnp.nan)
    line = refusal(scored, model, params)
    assert line == "Copying gives a loss that is not finite"
