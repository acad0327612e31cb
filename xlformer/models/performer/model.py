"""Performer (Choromanski et al. 2020, arXiv:2009.14794), and its rivals.

A pre-norm Transformer whose attention is one of five mechanisms, all with the same
parameters, so that weights of one begin a run of another
(train --init_from=DIR --config.model.mechanism=NAME):

- favor: softmax attention estimated by random features, or that of another kernel, in
  time linear in the length (kernels/features.py, kernels/linear_attention.py). Causal
  with rotary positions, it carries the sums of all that came before: segments equal one
  pass, and a generated token costs the same however many there were. The paper's runs
  do not: carry_sums=False.
- softmax: the exact one, of a segment.
- lsh: Reformer's (layers/lsh.py). Queries are keys: the projection of keys is carried
  and not read. Its hashes are drawn from a key a row in the state, the same for all
  rows, anew in each step. Later tokens move the borders of its chunks, so outputs can
  depend on their hashes, causal or not, and a reset lies only before a segment.
- linformer: keys and values projected along the length (layers/linformer.py), by E and
  F of each layer, which no other mechanism has. It looks ahead: causal=False only.
- identity: each token attends to itself alone; the paper's bound on speed.

From the paper and its programs (Google's, and performer-pytorch) FAVOR differs so:

- Strictly causal. The programs subtract from exponents the largest of all keys, later
  ones too, and add an epsilon after that; here it is the largest so far, nothing is
  added, and all is exact with logarithms. stabiliser='original' is as published
  (kernels/published.py), with feature_epsilon, renormaliser and maxima; it leaks the
  future through its maximum, and carries nothing.
- Orthogonal rows are uniform over rotations: the programs take Q of a QR decomposition
  as it comes, which is biased (layers/favor.py).
- A projection is drawn from (feature_seed, layer, step // redraw_interval), where
  Google's program takes the sum of the queries for a seed, in evaluation too, and
  performer-pytorch counts calls. Evaluation and generation use the checkpoint's draw.
  Sums of another draw are of other features: rows that carry some begin anew.
- Padding has no features. performer-pytorch puts zeros in place of keys, whose features
  are not zero.
- Features of other kernels (relu, ...) are of q and k as they are, with 1e-3 added, as
  in Google's program; without a projection (projected=False) as is its default. Those
  that can be negative need stabiliser='original'; trigonometric ones can cancel too.

And the model: positions are rotary, counted from the row's last reset on (a feature of
a turned vector knows more than distances), or a learned table, counted from the
segment's beginning; norms come before each sub-layer, and one at the end; networks are
ReLU's; no projection of attention has a bias; the one table is tied, and not scaled;
parameters begin normal (init_std). Attention dropout is of softmax alone, since the
others have no probabilities of pairs, or drop none here. Not here: reversible layers,
chunked networks, encoder and decoder, local heads.

What is causal and carries no sums continues a text by a window of context_length tokens
that slides (models/windowed.py), and is scored so too (`evaluate --stride`,
extended_length), but for lsh, where no reset lies inside a window.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlformer.kernels import linear_attention
from xlformer.layers import adaptive, attention, feed_forward
from xlformer.models import checks, parameters, sides
from xlformer.models.base import Model
from xlformer.models.performer import flops as flops_lib
from xlformer.models.performer import layer, trunk
from xlformer.models.performer.config import FAVOR, LSH, PerformerConfig
from xlformer.models.performer.trunk import Cached, Hashes, State, TrunkModule
from xlformer.models.tokens import TokenModel, Tokens
from xlformer.models.windowed import Windowed


class Performer(TokenModel):
    """The Performer behind the contract of `Model`, and what it is compared with."""

    Config = PerformerConfig

    def trunk_module(self, dtype) -> TrunkModule:
        return TrunkModule(self.config, dtype)

    def tokens(self) -> Tokens:
        """One table, tied."""
        normal = nn.initializers.normal(self.config.init_std)
        return Tokens(self.config.bins, table_init=normal)

    def _options(self, x_BT, resets_BT, *more, **options):
        # Before a segment there is nothing that a reset would hide, and without one
        # positions are constants of the program.
        if resets_BT is not None and resets_BT.shape[1] == 1:
            resets_BT = resets_BT if self.config.carries else None
        return super()._options(x_BT, resets_BT, *more, **options)

    @property
    def causal(self) -> bool:
        return self.config.causal

    @property
    def memory_length(self) -> int | None:
        """None where FAVOR's sums are carried; 0 otherwise."""
        return None if self.config.carries else 0

    @property
    def extended_length(self) -> int:
        return self.config.extended_length

    @property
    def longest_segment(self) -> int | None:
        config = self.config
        if not config.bounded:
            return None
        return config.context_length - config.extended_length

    @property
    def segments_equal_one_pass(self) -> bool:
        return self.config.carries

    @property
    def positions_from_end(self) -> bool:
        """True of lsh, whose sorted tokens are cut into chunks, later ones too.

        And of FAVOR as published, by the greatest exponent, which may be a later key's.
        """
        config = self.config
        leaks = config.mechanism == FAVOR and config.stabiliser != "running"
        return config.mechanism == LSH or (leaks and config.estimates)

    @property
    def resets_in_segment(self) -> bool:
        return self.config.resets_inside

    @property
    def needs_rngs(self) -> bool:
        return bool(self.config.dropout or self.config.attention_dropout)

    def init_state(self, batch_size: int, dtype=None):
        config = self.config
        if config.mechanism == LSH:
            words_W = jax.random.key_data(jax.random.key(config.feature_seed))
            return Hashes(jnp.broadcast_to(words_W, (batch_size, *words_W.shape)))
        if not config.carries:
            return ()
        one = linear_attention.empty(
            batch_size,
            config.n_head,
            config.feature_width,
            config.head_width,
            jnp.promote_types(dtype or self.dtype(), jnp.float32),
        )
        sums = jax.tree.map(lambda x: jnp.stack([x] * config.n_layer), one)
        zero_B = jnp.zeros(batch_size, jnp.int32)
        return State(sums, zero_B, zero_B)

    def state_axes(self):
        if self.config.mechanism == LSH:
            return Hashes(("batch", None))
        if not self.config.carries:
            return ()
        rows = "layers", "batch", "heads"
        sums = linear_attention.Sums((*rows, None, None), (*rows, None), rows)
        return State(sums, ("batch",), ("batch",))

    def to_cache(self, params, state, *, segment_length: int = 1):
        """The state, with room for the projections, which then are drawn once."""
        config = self.config
        if not config.caches:
            return state
        shape = config.n_layer, config.projection_rows, config.head_width
        dtype = jnp.promote_types(self.dtype(params), jnp.float32)
        return Cached(state, jnp.zeros(shape, dtype), jnp.full((), -1, jnp.int32))

    def cache_axes(self, *, segment_length: int = 1):
        axes = self.state_axes()
        return Cached(axes, (None,) * 3, ()) if self.config.caches else axes

    def param_axes(self, params):
        tables = attention.PARAM_AXES | feed_forward.PARAM_AXES | adaptive.PARAM_AXES
        return parameters.param_axes(
            params, tables | layer.PARAM_AXES | trunk.PARAM_AXES
        )

    def matrices(self, params):
        layers = attention.MATRICES | feed_forward.MATRICES | layer.MATRICES
        return sides.by_name(params, layers)

    def for_generation(self) -> Model:
        """FAVOR's sums are carried, and a token costs the same however many came.

        Without them it is the model on the last context_length tokens, which slide.
        """
        if self.causal and not self.config.carries:
            model = self.for_reading(extended_length=0)
            return Windowed.of(model, self.config.context_length)
        return super().for_generation()

    def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
        checks.heads(self.config, mesh)

    def flops(self, **options) -> flops_lib.Flops:
        return flops_lib.segment(self.config, **options)

    def kept_for_backward(self) -> float:
        return flops_lib.kept_for_backward(self.config)

    def summed_activations(self) -> float:
        """Four sums of the width in each layer (Shoeybi et al. 2019)."""
        return 4.0 * self.config.n_layer * self.config.d_model

    def to_save_memory(self) -> dict:
        return {} if self.config.remat != "none" else {"remat": "full"}

    def card(self) -> dict:
        config = self.config
        said = {"mechanism": config.mechanism}
        if config.mechanism == FAVOR:
            said |= {
                "features": config.features,
                "n_features": config.feature_width,
                "redraw_interval": config.interval,
                "stabiliser": config.stabiliser,
            }
        if not config.carries:
            said["context_length"] = config.context_length
        return {**super().card(), **said}
