"""check_model passes a model of another kind and fails every broken one, by name."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from xlformer import testing
from xlformer.models import Aux, TransformerXL, TransformerXLConfig
from xlformer.models.tokens import TokenModel, Trunk

CONFIG = TransformerXLConfig(
    vocab_size=23,
    n_layer=1,
    d_model=8,
    n_head=2,
    d_inner=11,
    memory_length=13,
    dropout=0.0,
    scan_layers=True,
)


def check(model):
    testing.check_model(model)


# A recurrent model: h_t = tanh(x_t + w h_t-1).


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    vocab_size: int = 19
    d_model: int = 5
    dtype: str = "auto"
    dropout: float = 0.0
    carried: bool = True


class Cell(nn.Module):
    carried: bool

    @nn.compact
    def __call__(self, x_BTD, state, *, resets_BT, lengths, step, train, keys):
        del step, train, keys
        B, T, D = x_BTD.shape
        weights_DD = self.param("weights", nn.initializers.normal(), (D, D))

        def body(h_BD, column):
            x_BD, reset_B, valid_B = column
            before_BD = jnp.where(reset_B[:, None], 0, h_BD)
            new_BD = jnp.tanh(x_BD + before_BD @ weights_DD)
            h_BD = jnp.where(valid_B[:, None], new_BD, h_BD)
            return h_BD, h_BD

        if resets_BT is None:
            resets_BT = jnp.zeros((B, T), bool)
        lengths_B = jnp.broadcast_to(T if lengths is None else lengths, (B,))
        valid_BT = jnp.arange(T)[None] < lengths_B[:, None]
        h_BD = state if self.carried else jnp.zeros_like(x_BTD[:, 0])
        columns = x_BTD.swapaxes(0, 1), resets_BT.T, valid_BT.T
        h_BD, y_TBD = lax.scan(body, h_BD, columns)
        return y_TBD.swapaxes(0, 1), h_BD if self.carried else (), Aux(0.0, {})


class Recurrent(TokenModel):
    @property
    def memory_length(self):
        return None if self.config.carried else 0

    def init_state(self, batch_size, dtype=None):
        if not self.config.carried:
            return ()
        return jnp.zeros((batch_size, self.config.d_model), dtype or self.dtype())

    def state_axes(self):
        return ("batch", "embed") if self.config.carried else ()

    def trunk_module(self, dtype):
        return Cell(self.config.carried)


@pytest.mark.parametrize("carried", [True, False])
def test_a_model_of_another_kind_passes(carried):
    check(Recurrent(RecurrentConfig(carried=carried)))


class ForgetsAfterThreeTokens(Recurrent):
    """Unlimited memory is claimed; the state of a segment of over 3 tokens is lost."""

    def apply(self, params, inputs_BT, targets_BT, state, **options):
        nll_BT, after, aux = super().apply(
            params, inputs_BT, targets_BT, state, **options
        )
        lost = inputs_BT.shape[1] > 3 and options.get("lengths_B") is None
        return nll_BT, after * 0 if lost else after, aux


# Broken models. Each changes the least that breaks one property.


class Broken(TransformerXL):
    """`change` sees everything that apply gets and gives."""

    def apply(self, params, inputs_BT, targets_BT, state, **options):
        options = self.options(dict(resets_BT=None, lengths_B=None) | options)
        arrays = inputs_BT, targets_BT
        nll_BT, after, aux = super().apply(params, *arrays, state, **options)
        return *self.change(inputs_BT, state, nll_BT, after), aux

    def options(self, options):
        return options

    def change(self, inputs_BT, before, nll_BT, after):
        del inputs_BT, before
        return nll_BT, after


class LeaksTheFuture(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT + 1e-7 * jnp.roll(inputs_BT, -1, axis=1), after


class IgnoresItsInput(Broken):
    def apply(self, params, inputs_BT, *arrays, **options):
        return super().apply(params, inputs_BT * 0, *arrays, **options)


class MixesRows(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT + 1e-9 * nll_BT.mean(0, keepdims=True), after


class MixesRowsOfTheState(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        mean = after.hidden_LBMD.mean(1, keepdims=True)
        return nll_BT, after._replace(hidden_LBMD=after.hidden_LBMD + 1e-9 * mean)


class NumbersItsRows(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT + 1e-7 * jnp.arange(len(nll_BT))[:, None], after


class IgnoresResets(Broken):
    def options(self, options):
        return options | dict(resets_BT=None)


class ResetsOnlyOnce(Broken):
    def options(self, options):
        resets_BT = options["resets_BT"]
        if resets_BT is not None:
            first_BT = jnp.cumsum(resets_BT, axis=1) == 1
            options["resets_BT"] = resets_BT & first_BT
        return options


class ResetsAllRows(Broken):
    def options(self, options):
        resets_BT = options["resets_BT"]
        if resets_BT is not None:
            every_BT = jnp.broadcast_to(
                resets_BT.any(0, keepdims=True), resets_BT.shape
            )
            options["resets_BT"] = every_BT
        return options


class ForgetsShortResets(Broken):
    def options(self, options):
        resets_BT = options["resets_BT"]
        if resets_BT is not None and resets_BT.shape[1] == 1:
            options["resets_BT"] = None
        return options


class LetsPaddingIn(Broken):
    """Into the memory; the nll is masked."""

    def apply(self, params, inputs_BT, targets_BT, state, *, lengths_B=None, **options):
        arrays = params, inputs_BT, targets_BT, state
        nll_BT, _, aux = super().apply(*arrays, lengths_B=lengths_B, **options)
        return nll_BT, super().apply(*arrays, **options)[1], aux


class ScoresPadding(Broken):
    def options(self, options):
        return options | dict(lengths_B=None)


class LosesItsMemory(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT, before


class LosesItsTrunksMemory(Broken):
    @property
    def trunk(self):
        class Forgetful(Trunk):
            def apply(self, params, x_BTD, state, **options):
                y_BTD, _, aux = super().apply(params, x_BTD, state, **options)
                return y_BTD, state, aux

        return Forgetful(self)


class BoastsOfItsMemory(Broken):
    """Says 13, holds 3."""

    memory_length = 13

    def __init__(self, config):
        super().__init__(dataclasses.replace(config, memory_length=3))


class TakesGradients(Broken):
    def apply(self, params, inputs_BT, targets_BT, state, **options):
        nll_BT, after, aux = super().apply(
            params, inputs_BT, targets_BT, state, **options
        )
        # Of numbers: what is lost in a state must not show in another property.
        leak = jnp.nan_to_num(state.hidden_LBMD).sum() * 1e-30
        return nll_BT + leak, after, aux


class GivesGradients(Broken):
    def apply(self, params, inputs_BT, targets_BT, state, **options):
        nll_BT, after, aux = super().apply(
            params, inputs_BT, targets_BT, state, **options
        )
        leak = params["softmax"]["bias"].sum() * 1e-30
        return nll_BT, after._replace(hidden_LBMD=after.hidden_LBMD + leak), aux


class DiffersWithoutJit(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT + 1e-7 * (not isinstance(nll_BT, jax.core.Tracer)), after


class DiffersUnrolled(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT + 1e-7 * (not self.config.scan_layers), after


class ComputesInFloat32(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT.astype(jnp.float32), after


class ChangesTheDtypeOfItsState(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT, after._replace(length_B=after.length_B.astype(jnp.float32))


class NamesTheWrongAxis(Broken):
    def state_axes(self):
        axes = super().state_axes()
        return axes._replace(hidden_LBMD=("batch", "layers", "memory", "embed"))


class HasVectorMetrics(Broken):
    def apply(self, *arrays, **options):
        nll_BT, after, _ = super().apply(*arrays, **options)
        return nll_BT, after, Aux(nll_BT.mean() * 0, {"nats": nll_BT[0]})


class HasUnnormalisedLogProbs(Broken):
    def log_probs(self, *arrays, **options):
        log_probs_BTV, after = super().log_probs(*arrays, **options)
        return log_probs_BTV + 1e-7, after


class ForgetsAsItCaches(Broken):
    segments = True

    def to_cache(self, params, state, *, segment_length=1):
        cache = super().to_cache(params, state, segment_length=segment_length)
        if (segment_length > 1) != self.segments:
            return cache
        return cache._replace(length_B=jnp.maximum(cache.length_B - 1, 0))


class ForgetsAsItCachesForTokens(ForgetsAsItCaches):
    segments = False


BROKEN = {
    LeaksTheFuture: "causal: outputs before a changed token 2: differs by",
    IgnoresItsInput: "causal: no output from token 0 on",
    MixesRows: "rows: others, when row 0 changes: differs by",
    MixesRowsOfTheState: "rows: others, when row 0 changes: differs by",
    NumbersItsRows: "rows: in another order: differs by",
    IgnoresResets: r"resets at \[0\]: nll from there on: differs by",
    ResetsOnlyOnce: r"resets at \[2, 5\]: nll from there on: differs by",
    ResetsAllRows: "resets: a row without one: differs by",
    ForgetsShortResets: r"padding: one number and resets \[B, 1\]: differs by",
    LetsPaddingIn: "padding: state: differs by",
    ScoresPadding: "padding: nll, 0 where padded: differs by",
    LosesItsMemory: "segments: of .* one pass, nll: differs by",
    LosesItsTrunksMemory: "segments: the trunk by single tokens .* differs by",
    BoastsOfItsMemory: "segments: of .* one pass, nll: differs by",
    TakesGradients: "gradient: to the state given: differs by",
    GivesGradients: "gradient: from the state returned .*: differs by",
    DiffersWithoutJit: "loops: without jit: differs by",
    DiffersUnrolled: "loops: scan_layers=False: differs by",
    ComputesInFloat32: "state: float64 became float32",
    ChangesTheDtypeOfItsState: "state: .*int32.* became .*float32",
    NamesTheWrongAxis: "state: state_axes gives",
    HasVectorMetrics: "state: aux must hold scalars",
    HasUnnormalisedLogProbs: "log_probs: at the targets, and -nll: differs by",
    ForgetsAsItCaches: "cache of 7: nll of call 0: differs by",
    ForgetsAsItCachesForTokens: "cache of 1: nll of call 0: differs by",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_model_fails_by_the_property_it_breaks(kind, monkeypatch):
    """The other properties are left out: each compiles programs of its own."""
    (name,) = re.findall(r"^\w+", BROKEN[kind])
    names = {"segments": ("segments", "single_tokens")}.get(name, (name,))
    mine = [c for c in testing.CHECKS if c.__name__.removeprefix("_check_") in names]
    assert mine or name == "state"
    monkeypatch.setattr(testing, "CHECKS", mine)
    with pytest.raises(AssertionError, match=f"^{BROKEN[kind]}"):
        check(kind(CONFIG))


def test_a_state_that_is_lost_now_and_then_is_noticed():
    with pytest.raises(AssertionError, match="segments: of .* differs by"):
        check(ForgetsAfterThreeTokens(RecurrentConfig()))
