"""Models for the tests of check_model: the least that breaks each property."""

import dataclasses

import jax
import jax.numpy as jnp
import own_model
from own_model import Gated
from own_trunk import Recurrent, RecurrentConfig

from xlformer.models import Aux, TransformerXL, TransformerXLConfig
from xlformer.models.tokens import Trunk


@dataclasses.dataclass(frozen=True)
class Config(own_model.Config):
    scan_layers: bool = True


GATED = Config(vocab_size=19, width=3, dropout=0.1)


# Broken models. Each changes the least that breaks one property.


class Changed:
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


class Broken(Changed, Gated):
    """A recurrence compiles in a fifth of the time of a Transformer-XL."""

    CONFIG = GATED


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
        return nll_BT, after + 1e-9 * after.mean(0, keepdims=True)


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


class ForgetsAfterThreeTokens(Broken):
    """Now and then: where a segment has over 3 tokens and no padding."""

    def apply(self, params, inputs_BT, targets_BT, state, **options):
        nll_BT, after, aux = super().apply(
            params, inputs_BT, targets_BT, state, **options
        )
        lost = inputs_BT.shape[1] > 3 and options.get("lengths_B") is None
        return nll_BT, after * 0 if lost else after, aux


class MixesUpSingleTokens(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT, before if inputs_BT.shape[1] == 1 else after


class LosesItsTrunksMemory(Recurrent):
    CONFIG = RecurrentConfig()

    @property
    def trunk(self):
        class Forgetful(Trunk):
            def apply(self, params, x_BTD, state, **options):
                y_BTD, _, aux = super().apply(params, x_BTD, state, **options)
                return y_BTD, state, aux

        return Forgetful(self)


class BoastsOfItsMemory(TransformerXL):
    """Says 13, holds 3."""

    CONFIG = TransformerXLConfig(
        vocab_size=23,
        n_layer=1,
        d_model=8,
        n_head=2,
        d_inner=11,
        dropout=0.0,
        scan_layers=True,
    )
    memory_length = 13

    def __init__(self, config):
        super().__init__(dataclasses.replace(config, memory_length=3))


class TakesGradients(Broken):
    def apply(self, params, inputs_BT, targets_BT, state, **options):
        nll_BT, after, aux = super().apply(
            params, inputs_BT, targets_BT, state, **options
        )
        # Of numbers: what is lost in a state must not show in another property.
        leak = jnp.nan_to_num(state).sum() * 1e-30
        return nll_BT + leak, after, aux


class GivesGradients(Broken):
    def apply(self, params, inputs_BT, targets_BT, state, **options):
        nll_BT, after, aux = super().apply(
            params, inputs_BT, targets_BT, state, **options
        )
        return nll_BT, after + params["table_VD"].sum() * 1e-30, aux


class DiffersWithoutJit(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT + 1e-7 * (not isinstance(nll_BT, jax.core.Tracer)), after


class DiffersUnrolled(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT + 1e-7 * (not self.config.scan_layers), after


class ComputesInFloat32(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT.astype(jnp.float32), after


class BeginsInHalf(Broken):
    """Its optimizer would be in it too."""

    def init(self, key):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), super().init(key))


class ChangesTheDtypeOfItsState(Broken):
    def change(self, inputs_BT, before, nll_BT, after):
        return nll_BT, after.astype(jnp.float16)


class NamesTheWrongAxis(Broken):
    def state_axes(self):
        return (None, "batch")


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
        return state * 0.5 if (segment_length > 1) == self.segments else state


class ForgetsAsItCachesForTokens(ForgetsAsItCaches):
    segments = False


class BoastsOfItsReplay(Broken):
    def replay(self, segment_length):
        return 1


class CountsSegmentsNotTokens(Broken):
    """Sees five tokens back: one segment of seven is enough, one of two is not."""

    def init_state(self, batch_size, dtype=None):
        return jnp.zeros((batch_size, 5), jnp.int32)

    def apply(self, params, inputs_BT, targets_BT, state, **options):
        inputs_BT = jnp.concatenate([state, inputs_BT], 1).astype(state.dtype)
        targets_BT = jnp.concatenate([state, targets_BT], 1)
        h_BD = super().init_state(len(state), params["table_VD"].dtype)
        nll_BT, _, aux = super().apply(params, inputs_BT, targets_BT, h_BD, **options)
        return nll_BT[:, 5:], inputs_BT[:, -5:], aux

    def replay(self, segment_length):
        return 1


class SaysItLooksAhead(Broken):
    causal = False


class WantsANumber(Broken):
    def options(self, options):
        return options | dict(train=options.get("step", 0) > 5 and options["train"])


class TakesNoStep(Broken):
    def apply(self, *arrays, resets_BT=None, lengths_B=None, train=False, rngs=None):
        options = dict(resets_BT=resets_BT, lengths_B=lengths_B)
        return super().apply(*arrays, **options, train=train, rngs=rngs)


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
    ForgetsAfterThreeTokens: "segments: of .* one pass, nll: differs by",
    MixesUpSingleTokens: "segments: nll by single tokens .* differs by",
    LosesItsTrunksMemory: "segments: the trunk by single tokens .* differs by",
    BoastsOfItsMemory: "segments: of .* one pass, nll: differs by",
    TakesGradients: "gradient: to the state given: differs by",
    GivesGradients: "gradient: from the state returned .*: differs by",
    DiffersWithoutJit: "loops: without jit: differs by",
    DiffersUnrolled: "loops: .*, layers with scan_layers=False: differs by",
    ComputesInFloat32: "state: float64 became float32",
    BeginsInHalf: "state: init gives .*bfloat16.*, not float32",
    ChangesTheDtypeOfItsState: "state: .*float32.* became .*float16",
    NamesTheWrongAxis: "state: state_axes gives",
    BoastsOfItsReplay: "replay: of 1 segments of 7: differs by",
    CountsSegmentsNotTokens: "replay: of 1 segments of 2: differs by",
    SaysItLooksAhead: "causal: False, but no output depends on a later",
    WantsANumber: "step: apply takes none that is traced",
    TakesNoStep: "step: apply takes none that is traced",
    HasVectorMetrics: "state: aux must hold scalars",
    HasUnnormalisedLogProbs: "log_probs: at the targets, and -nll: differs by",
    ForgetsAsItCaches: "cache of 7: nll of call 0: differs by",
    ForgetsAsItCachesForTokens: "cache of 1: nll of call 0: differs by",
}
