"""Adaptive input and adaptive softmax (Baevski & Auli 2019; Grave et al. 2017).

Ids are sorted by frequency; bin b holds ids [edges[b], edges[b+1]). With div_val = k,
words of bin b have embeddings of width d_embed // k^b and each bin its projection to
d_model. The softmax's head holds the words of bin 0 and one entry for each tail bin.
Without cutoffs there is one bin, and the softmax is the plain one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from xlformer.kernels.cross_entropy import selected_nll, softmax_nll
from xlformer.sharding import RULES, constrain, free_axes

# Logical axes of the parameters: see models.parameters.param_axes.
PARAM_AXES = {
    "embedding/table": ("vocab", "embed"),
    "embedding/projection": (None, "embed"),
    "softmax/table": ("vocab", "embed"),
    "softmax/projection": ("embed", None),
    "softmax/bias": ("vocab",),
}


@dataclasses.dataclass(frozen=True)
class Bins:
    """The shapes of the tables of embedding and softmax: arithmetic, and no array.

    Attributes:
      vocab_size: number of token ids.
      d_model: width of the vectors that go in and out.
      d_embed: width of the embeddings of bin 0.
      cutoffs: the first id of each tail bin; () is the plain softmax.
      div_val: bin b has embeddings of width d_embed // div_val**b.
      proj_same_dim: whether, with div_val > 1, a bin has a projection even where its
        width is d_model already.
    """

    vocab_size: int
    d_model: int
    d_embed: int
    cutoffs: tuple[int, ...] = ()
    div_val: int = 1
    proj_same_dim: bool = True

    @property
    def edges(self) -> tuple[int, ...]:
        """Bin b holds the ids from edges[b] to edges[b + 1], exclusive."""
        return (0, *self.cutoffs, self.vocab_size)

    @property
    def n_tail(self) -> int:
        """How many bins there are beside bin 0."""
        return len(self.cutoffs)

    def width(self, b: int) -> int:
        """The width of the embeddings of bin b."""
        return self.d_embed // self.div_val**b

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        """Name and shape of each table: one of all words, or with div_val one a bin."""
        if self.div_val == 1:
            return {"table": (self.vocab_size, self.d_embed)}
        sizes = zip(self.edges, self.edges[1:], strict=False)
        return {
            f"table_{b}": (stop - start, self.width(b))
            for b, (start, stop) in enumerate(sizes)
        }

    def projects(self, b: int) -> bool:
        """Whether words of bin b go through a projection."""
        # With div_val > 1 the PyTorch original projects every bin, bin 0 of width
        # d_model included; the TensorFlow original's lm1b scripts spare that one.
        if self.div_val == 1 or not self.proj_same_dim:
            return self.width(b) != self.d_model
        return True

    def embedding_projection(self, b: int) -> str | None:
        """Name of the projection on the input side; with div_val 1 bins share it."""
        if not self.projects(b):
            return None
        return f"projection_{0 if self.div_val == 1 else b}"

    def shares(self, probabilities_V: np.ndarray | None = None) -> list[float]:
        """How much of the text lies in each bin; by default by Zipf's law."""
        if probabilities_V is None:
            probabilities_V = frequencies(self.vocab_size)
        pairs = zip(self.edges, self.edges[1:], strict=False)
        return [float(probabilities_V[start:stop].sum()) for start, stop in pairs]

    def flops(
        self, *, targets: int, inputs: int, shares: Sequence[float] | None = None
    ) -> float:
        """FLOPs of the softmax and of all projections, forward.

        Args:
          targets: how many are scored.
          inputs: how many are embedded.
          shares: of the text in each bin, which decides how often a tail is computed;
            by default those of `shares`.
        """
        total = 0.0
        for b, share in enumerate(self.shares() if shares is None else shares):
            words = self.edges[b + 1] - self.edges[b] + (self.n_tail if b == 0 else 0)
            # Every target is scored in the head, and in a tail those that lie in it.
            scored = targets * (1.0 if b == 0 else share)
            total += 2.0 * scored * self.width(b) * words
            if self.projects(b):
                projected = scored + inputs * share
                total += 2.0 * projected * self.width(b) * self.d_model
        return total


# Zipf's law for the words of a text, p(rank) ~ rank^-1.07. For the four bins of
# WikiText-103 it gives shares of .87, .04, .08 and .01, where those of the text itself
# are .86, .055, .06 and .025. The shares decide what an adaptive softmax costs.
ZIPF = 1.07


def frequencies(vocab_size: int) -> np.ndarray:
    """Probability of each id, most frequent first, by Zipf's law."""
    weights = np.arange(1, vocab_size + 1, dtype=np.float64) ** -ZIPF
    return weights / weights.sum()


def drop_words(x_BTD, ids_BT, keep_V, rate: float) -> jax.Array:
    """Zeroes all occurrences of the words that keep_V, a mask, leaves out; rescales.

    It is dropout of whole rows of the table (Gal & Ghahramani 2016), at the cost of the
    tokens and not of the table.
    """
    kept_BT1 = keep_V[ids_BT][..., None]
    return jnp.where(kept_BT1, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)


class AdaptiveEmbedding(nn.Module):
    """Turns token ids into vectors of width d_model, without any scaling."""

    bins: Bins
    table_init: Any
    projection_init: Any
    dtype: Any

    def setup(self):
        bins = self.bins
        for name, shape in bins.tables.items():
            setattr(self, name, self.param(name, self.table_init, shape))
        names = {bins.embedding_projection(b) for b in range(bins.n_tail + 1)} - {None}
        # Sorted, because the order of a set of strings differs between processes.
        for name in sorted(names):
            shape = (bins.width(int(name.split("_")[1])), bins.d_model)
            setattr(self, name, self.param(name, self.projection_init, shape))

    def __call__(self, ids_BT):
        with jax.named_scope("embedding"):
            if self.bins.div_val == 1:
                # An index, and no product with one-hot vectors, whose gradient took 57
                # times as long for 2,048 tokens of 50,000 words (2 CPU cores). The
                # table is gathered over fsdp for the reason that _bin gives.
                table_VE = constrain(self.table, "vocab", None)
                return self._project(table_VE[ids_BT].astype(self.dtype), 0)
            # Every bin looks up every token, because how many belong to it is not known
            # when the program is compiled. Ids of other bins are clipped to a row that
            # exists; `where` drops the result, and with it the gradient of that row.
            y_BTD = jnp.zeros((*ids_BT.shape, self.bins.d_model), self.dtype)
            edges = self.bins.edges
            for b, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
                rows_BT = jnp.clip(ids_BT - start, 0, stop - start - 1)
                table_VE = constrain(getattr(self, f"table_{b}"), "vocab", None)
                x_BTE = table_VE[rows_BT].astype(self.dtype)
                inside_BT = (ids_BT >= start) & (ids_BT < stop)
                y_BTD = jnp.where(inside_BT[..., None], self._project(x_BTE, b), y_BTD)
            return y_BTD

    def _project(self, x_BTE, b):
        name = self.bins.embedding_projection(b)
        if name is None:
            return x_BTE
        return jnp.einsum("BTE,ED->BTD", x_BTE, getattr(self, name).astype(self.dtype))


def is_tied(tie_projections: Sequence[bool], b: int) -> bool:
    """Whether the softmax uses the embedding's projection of bin b; () ties none."""
    return b < len(tie_projections) and tie_projections[b]


class AdaptiveSoftmax(nn.Module):
    """Negative log-likelihoods and log-probabilities, in position order.

    Tied parts are the embedding's own arrays, passed in by the caller.
    """

    bins: Bins
    tie_weights: bool
    tie_projections: tuple[bool, ...]
    table_init: Any
    projection_init: Any
    cluster_init: Any
    dtype: Any

    def setup(self):
        bins = self.bins
        # Tying is of tables only: the output biases are the softmax's own, as in both
        # originals.
        self.bias = self.param("bias", nn.initializers.zeros, (bins.vocab_size,))
        if not self.tie_weights:
            for name, shape in bins.tables.items():
                setattr(self, name, self.param(name, self.table_init, shape))
        for b in range(bins.n_tail + 1):
            if bins.projects(b) and not is_tied(self.tie_projections, b):
                name, shape = f"projection_{b}", (bins.d_model, bins.width(b))
                setattr(self, name, self.param(name, self.projection_init, shape))
        if bins.n_tail:
            shape = (bins.n_tail, bins.d_embed)
            self.cluster_kernel = self.param("cluster_kernel", self.cluster_init, shape)
            zeros = nn.initializers.zeros
            self.cluster_bias = self.param("cluster_bias", zeros, (bins.n_tail,))

    def __call__(self, h_ND, targets_N, embedding):
        """nll_N of each target in nats, without an array of N x V ever existing."""
        with jax.named_scope("adaptive_softmax"):
            table_VE, bias_V = self._bin(0, embedding)
            h_NE = self._project(h_ND, 0, embedding)
            if not self.bins.n_tail:
                return softmax_nll(h_NE, table_VE, bias_V, targets_N)
            # p(word) = p(its bin in the head) p(word in the bin): every token pays for
            # the head, and a tail adds its own part to the tokens that lie in it.
            cluster_N = sum(
                (targets_N >= c).astype(jnp.int32) for c in self.bins.cutoffs
            )
            first = self.bins.cutoffs[0]
            head_N = jnp.where(cluster_N == 0, targets_N, first + cluster_N - 1)
            table_VE, bias_V = self._head(table_VE, bias_V)
            nll_N = softmax_nll(h_NE, table_VE, bias_V, head_N)
            for b in range(1, self.bins.n_tail + 1):
                start, stop = self.bins.edges[b : b + 2]
                table_VE, bias_V = self._bin(b, embedding)
                rows_N = jnp.clip(targets_N - start, 0, stop - start - 1)
                h_NE = self._project(h_ND, b, embedding)
                # Of the selected tokens alone: the tails of all tokens would cost
                # WikiText-103 base 219 MFLOP a token, against 27 for the whole adaptive
                # softmax (counted with a tail share of .14).
                nll_N += _tail_nll(h_NE, table_VE, bias_V, rows_N, cluster_N == b)
            return nll_N

    def log_probs(self, h_ND, embedding):
        """log p of every word, [N, V]: for generation, a few rows at a time."""
        table_VE, bias_V = self._bin(0, embedding)
        h_NE = self._project(h_ND, 0, embedding)
        if not self.bins.n_tail:
            return self._log_softmax(h_NE, table_VE, bias_V)
        head_NV = self._log_softmax(h_NE, *self._head(table_VE, bias_V))
        first = self.bins.cutoffs[0]
        parts = [head_NV[:, :first]]
        for b in range(1, self.bins.n_tail + 1):
            h_NE = self._project(h_ND, b, embedding)
            tail_NV = self._log_softmax(h_NE, *self._bin(b, embedding))
            parts.append(head_NV[:, first + b - 1 : first + b] + tail_NV)
        return jnp.concatenate(parts, axis=1)

    def _log_softmax(self, h_NE, table_VE, bias_V):
        # Logits and their sum in at least float32; float64 stays float64.
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        logits_NV = jnp.einsum(
            "NE,VE->NV", h_NE, table_VE.astype(self.dtype), preferred_element_type=dtype
        )
        return jax.nn.log_softmax(logits_NV + bias_V.astype(dtype)[None])

    def _head(self, table_VE, bias_V):
        """Bin 0's words, then one entry for each tail bin, in forward order.

        The TensorFlow original has that order, too. The PyTorch original keeps the
        entries of its bins reversed, which conversion turns round.
        """
        return (
            jnp.concatenate([table_VE, self.cluster_kernel.astype(table_VE.dtype)]),
            jnp.concatenate([bias_V, self.cluster_bias.astype(bias_V.dtype)]),
        )

    def _bin(self, b, embedding):
        start, stop = self.bins.edges[b : b + 2]
        source = embedding if self.tie_weights else self
        if self.bins.div_val == 1:
            table_VE = source.table[start:stop]
        else:
            table_VE = getattr(source, f"table_{b}")
        # Gathered over fsdp as it is used: a lookup in a table that is split by both
        # axes is beyond XLA's partitioner (jax 0.10.2).
        return constrain(table_VE, "vocab", None), self.bias[start:stop]

    def _project(self, h_ND, b, embedding):
        if not self.bins.projects(b):
            return h_ND
        if is_tied(self.tie_projections, b):
            kernel_ED = getattr(embedding, self.bins.embedding_projection(b))
            return jnp.einsum("ND,ED->NE", h_ND, kernel_ED.astype(self.dtype))
        kernel_DE = getattr(self, f"projection_{b}").astype(self.dtype)
        return jnp.einsum("ND,DE->NE", h_ND, kernel_DE)


def _tail_nll(h_NE, table_VE, bias_V, rows_N, selected_N):
    """selected_nll, by each device for its own tokens.

    Left to the compiler, tokens would be moved together across devices: a gather of all
    of them. The `data` axis is split already where gradients are computed.
    """
    free = free_axes()
    axes = tuple(a for a in RULES["batch"] if free.get(a, 1) > 1)
    # shard_map splits evenly or not at all; what does not divide is the compiler's.
    if not axes or rows_N.shape[0] % math.prod(free[a] for a in axes):
        return selected_nll(h_NE, table_VE, bias_V, rows_N, selected_N)
    return jax.shard_map(
        selected_nll,
        in_specs=(P(axes), P(), P(), P(axes), P(axes)),
        out_specs=P(axes),
        axis_names=set(axes),
        check_vma=False,  # loops that end at another step on each device
    )(h_NE, table_VE, bias_V, rows_N, selected_N)
