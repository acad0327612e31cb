"""The vanilla character Transformer (Al-Rfou et al. 2018, arXiv:1808.04444).

Causal self-attention and a ReLU network, each with residual and norm; every layer adds
a learned position to its input. Nothing is carried: a segment sees itself alone, and
positions count from its beginning, or from a reset within it. In training the layers
have auxiliary losses (layers/auxiliary.py), which this model computes with classifiers
that nothing else uses; the loss at all positions is every model's here.

The paper leaves open, and its program is not public: where norms are (here after each
residual), biases of attention (attention_bias, by default none), a scale of the
embeddings (none), what a classifier reads (the layer's output), how the layers' losses
are put together (a sum), how parameters begin (normal, init_std), whether embedding and
softmax are tied (not).

It differs from the paper in training:

- Segments of a row follow each other in the text, where the paper draws windows.
- The last position of a segment has no target after next: that token is not given.
  The mean is over the positions that have one.
- loss_steps=0 takes the steps of the run that trains it (`for_training`), also where
  that has changed since; a model by itself never stops its layers' losses.

It is evaluated as in the paper by a window that slides, `evaluate --stride=1`: leading
inputs without a target are extended_length. A text is continued in the same way
(models/windowed.py): what is longer than context_length slides out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlformer.layers import adaptive, attention, auxiliary, feed_forward
from xlformer.layers.auxiliary import Classifier, Targets
from xlformer.models import checks, parameters, sides
from xlformer.models.base import Aux, Model
from xlformer.models.tokens import TokenModel, TokenModule, Tokens
from xlformer.models.vanilla.config import VanillaConfig
from xlformer.models.vanilla.trunk import Readout, TrunkModule
from xlformer.models.windowed import Windowed


class Auxiliary(nn.Module):
    """The parameters of the classifiers that only training uses, stacked by layer."""

    config: VanillaConfig

    @nn.compact
    def __call__(self) -> tuple[Classifier | None, Classifier | None]:
        """Those of the next token of all layers but the last, and of the one after."""
        inner, second = self.config.classified
        return self._stacked("next", inner), self._stacked("second", second)

    def _stacked(self, name: str, layers: int) -> Classifier | None:
        if not layers:
            return None
        V, D = self.config.vocab_size, self.config.d_model
        normal = nn.initializers.normal(self.config.init_std)
        table_LVD = self.param(f"{name}_table", normal, (layers, V, D))
        bias_LV = self.param(f"{name}_bias", nn.initializers.zeros, (layers, V))
        return Classifier(table_LVD, bias_LV)


class VanillaModule(TokenModule):
    """Embedding, trunk and softmax, and in training the classifiers beside them."""

    config: VanillaConfig = VanillaConfig()

    def setup(self):
        super().setup()
        self.auxiliary = Auxiliary(self.config)

    def __call__(
        self,
        ids_BT,
        targets_BT,
        state,
        *,
        step=None,
        train=False,
        lengths=None,
        **options,
    ):
        asked = any(self.config.classified)
        if asked and self.is_initializing():
            self.auxiliary()
        options |= {"step": step, "train": train, "lengths": lengths}
        if not (asked and train):
            return super().__call__(ids_BT, targets_BT, state, **options)
        T = targets_BT.shape[1]
        extra = ids_BT.shape[1] - T
        targets = Targets.of(targets_BT, None if lengths is None else lengths - extra)
        weights_L2 = self._weights(step)

        def read(y_BTD, part):
            classifiers, weights = part
            return auxiliary.loss(y_BTD[:, -T:], classifiers, targets, weights)

        readout = Readout(read, (self._classifiers(), weights_L2))
        nll_BT, state, loss_L = super().__call__(
            ids_BT, targets_BT, state, readout=readout, **options
        )
        loss = loss_L.sum()
        metrics = {
            "auxiliary/loss": loss,
            "auxiliary/layers": (weights_L2.max(1) > 0).sum(),
        }
        return nll_BT, state, Aux(loss, metrics)

    def run_trunk(self, x_BTD, state, *, readout=None, **options):
        return self.trunk(x_BTD, state, readout=readout, **options)

    def layers(self, ids_BT, targets: Targets, state, **options):
        """What VanillaTransformer.layers returns, and the state."""

        def read(y_BTD, classifiers):
            pairs = zip(classifiers, targets[:2], strict=True)
            return y_BTD, *(c and c.nll(y_BTD, t_BT) for c, t_BT in pairs)

        readout = Readout(read, self._classifiers())
        y_BTD, state, kept = self._forward(ids_BT, state, readout=readout, **options)
        outputs_LBTD, next_LBT, second_LBT = kept
        B, T, D = y_BTD.shape
        arguments = y_BTD.reshape(B * T, D), targets.next_BT.reshape(-1), self.embedding
        last_1BT = self.softmax(*arguments).reshape(1, B, T)
        # Zeros stand for the classifiers that are not there: those in front.
        inner, second = self.config.classified
        if inner:
            last_1BT = jnp.concatenate([next_LBT[:inner], last_1BT])
        if second:
            second_LBT = second_LBT[-second:]
        return (outputs_LBTD, last_1BT, second_LBT), state

    def _weights(self, step):
        """What the two losses of each layer count at this step, [L, 2]."""
        config = self.config
        active_L = auxiliary.active(config.n_layer, config.loss_steps, step)
        last_L = jnp.arange(config.n_layer) == config.n_layer - 1
        if not config.layer_losses:
            active_L = last_L
        # The last layer's own prediction is the model's, and no auxiliary one.
        weights = active_L & ~last_L, active_L * config.second_target_weight
        exact = jnp.promote_types(self.dtype, jnp.float32)
        return jnp.stack([x.astype(exact) for x in weights], 1)

    def _classifiers(self):
        """Those of each layer, [L, ...]; zeros that nobody reads where it has none."""

        def stacked(leaf, after):
            before = self.config.n_layer - leaf.shape[0] - after
            return jnp.pad(leaf, [(before, after)] + [(0, 0)] * (leaf.ndim - 1))

        following, second = self.auxiliary()
        return (
            jax.tree.map(lambda leaf: stacked(leaf, 1), following),
            jax.tree.map(lambda leaf: stacked(leaf, 0), second),
        )


class VanillaTransformer(TokenModel):
    """The vanilla Transformer behind the contract of `Model`; it has no state."""

    Config = VanillaConfig

    def trunk_module(self, dtype) -> TrunkModule:
        return TrunkModule(self.config, dtype)

    def _module(self, dtype) -> VanillaModule:
        return VanillaModule(
            self.trunk_module(dtype), self.tokens(), dtype, self.config
        )

    def tokens(self) -> Tokens:
        normal = nn.initializers.normal(self.config.init_std)
        return Tokens(self.config.bins, tie_weights=False, table_init=normal)

    def _options(self, x_BT, resets_BT, *more, **options):
        # Before a segment there is nothing that a reset would hide, and without one the
        # positions are a slice of their table, whose gradient is no scatter.
        if resets_BT is not None and resets_BT.shape[1] == 1:
            resets_BT = None
        return super()._options(x_BT, resets_BT, *more, **options)

    @property
    def memory_length(self) -> int:
        return 0

    @property
    def extended_length(self) -> int:
        return self.config.extended_length

    @property
    def longest_segment(self) -> int:
        return self.config.context_length - self.config.extended_length

    @property
    def segments_equal_one_pass(self) -> bool:
        return False

    @property
    def positions_from_end(self) -> bool:
        return False

    @property
    def needs_rngs(self) -> bool:
        return bool(self.config.dropout or self.config.attention_dropout)

    def init_state(self, batch_size: int, dtype=None) -> tuple:
        """Nothing."""
        del batch_size, dtype
        return ()

    def state_axes(self) -> tuple:
        return ()

    def for_training(self, steps: int) -> Model:
        return self.for_reading(loss_steps=self.config.loss_steps or steps)

    def for_generation(self) -> Model:
        """The model on the last context_length tokens, which slide."""
        model = self.for_reading(extended_length=0)
        return Windowed.of(model, self.config.context_length)

    def active(self, step) -> jax.Array:
        """Which layers predict in training at this step, [L]."""
        config = self.config
        return auxiliary.active(config.n_layer, config.loss_steps, step)

    def layers(self, params, inputs_BT, targets_BT, second_BT, *, resets_BT=None):
        """What every layer gives: (outputs_LBTD, next_LBT, second_LBT).

        Args:
          second_BT: the token after the next at each position.

        Returns:
          The outputs, and the nll of both targets in nats; the last layer's of the next
          one is what `apply` gives. Without layer_losses only the last layer predicts,
          and of the target after next there is None without second_target_weight.
        """
        everywhere_BT = jnp.ones(jnp.shape(targets_BT), bool)
        targets = Targets(targets_BT, second_BT, everywhere_BT, everywhere_BT)
        options = self._options(inputs_BT, resets_BT, None, None)
        return self._run(params, "layers", inputs_BT, targets, (), **options)[0]

    def param_axes(self, params):
        tables = attention.PARAM_AXES | feed_forward.PARAM_AXES | adaptive.PARAM_AXES
        return parameters.param_axes(params, tables | auxiliary.PARAM_AXES | TRUNK_AXES)

    def matrices(self, params):
        layers = attention.MATRICES | feed_forward.MATRICES
        return sides.by_name(params, layers)

    def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
        checks.heads(self.config, mesh)

    def flops(self, **options) -> Flops:
        return flops(self.config, **options)

    def kept_for_backward(self) -> float:
        """Numbers a token: what all layers keep, and one layer more."""
        config = self.config
        layer = PER_WIDTH * config.d_model + PER_INNER * config.d_inner
        kept = config.d_model if config.remat == "full" else layer
        return float(config.n_layer * kept + layer)

    def summed_activations(self) -> float:
        """Four sums of the width in each layer (Shoeybi et al. 2019)."""
        return 4.0 * self.config.n_layer * self.config.d_model

    def to_save_memory(self) -> dict:
        return {} if self.config.remat != "none" else {"remat": "full"}

    def card(self) -> dict:
        return {**super().card(), "context_length": self.config.context_length}


# Rows of a table, as those of the embedding are.
TRUNK_AXES = {"trunk/position": (None, "vocab", "embed")}
# As fitted for Transformer-XL's layer: see transformer_xl/footprint.py.
PER_WIDTH, PER_INNER = 13, 8


@dataclasses.dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one segment of all rows, by what they are spent on.

    Useful ones: a multiplication and an addition are 2, only matrix products count, and
    no key that a query may not see.

    Attributes:
      feed_forward, projections, attention: of the layers.
      vocabulary: the softmax.
      classifiers: of training alone, on average over a run.
    """

    feed_forward: float
    projections: float
    attention: float
    vocabulary: float
    classifiers: float

    @property
    def forward(self) -> float:
        return self.feed_forward + self.projections + self.attention + self.vocabulary

    @property
    def training(self) -> float:
        """The gradient of a product is one more for each of its two arguments."""
        return 3 * (self.forward + self.classifiers)


def flops(
    config: VanillaConfig,
    *,
    batch_size: int,
    segment_length: int,
    shares: Sequence[float] | None = None,
    cached: bool = False,
) -> Flops:
    """Counts one segment of all rows; see Model.flops."""
    del cached  # There is no state.
    targets, L = batch_size * segment_length, config.n_layer
    T = segment_length + config.extended_length
    N, W = batch_size * T, config.n_head * config.head_width
    seen_T = config.visibility().keys_seen(T, T)
    vocabulary = config.bins.flops(targets=targets, inputs=N, shares=shares)
    # Layer l predicts for l / 2L of the run: (L - 1) / 4 layers on average, and the
    # last one's target after next for all of it.
    inner = (L - 1) / 4 if config.layer_losses else 0
    kinds = 2 if config.second_target_weight else 1
    return Flops(
        feed_forward=4.0 * L * N * config.d_model * config.d_inner,
        projections=8.0 * L * N * config.d_model * W,
        attention=4.0 * L * batch_size * W * float(seen_T.sum()),
        vocabulary=vocabulary,
        classifiers=vocabulary * (inner * kinds + kinds - 1),
    )
