"""Adaptive input and softmax against one softmax after the other, from the weights."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import jit

from xlformer import sharding
from xlformer.layers.adaptive import AdaptiveEmbedding, AdaptiveSoftmax, Bins

N, V, D = 7, 23, 8
CUTOFFS = (5, 11)
# fields of Bins, tie_weights, tie_projections
CASES = {
    "plain": (dict(), True, ()),
    "plain_narrow": (dict(d_embed=6), True, ()),
    "plain_untied": (dict(d_embed=6), False, (True,)),
    "bins": (dict(cutoffs=CUTOFFS), True, ()),
    "bins_narrow": (dict(cutoffs=CUTOFFS, d_embed=6), True, (False, True, True)),
    "div_4": (dict(cutoffs=CUTOFFS, d_embed=16, div_val=4), True, (False, True, True)),
    "div_4_same_width": (dict(cutoffs=CUTOFFS, div_val=4), False, ()),
    "div_4_unprojected_head": (
        dict(cutoffs=CUTOFFS, div_val=4, proj_same_dim=False),
        True,
        (),
    ),
}


class _Both(nn.Module):
    """As in the models: one embedding, one softmax that may use its arrays."""

    bins: Bins
    tie_weights: bool
    tie_projections: tuple[bool, ...]

    def setup(self):
        normal, dtype = nn.initializers.normal(1.0), jnp.float32
        self.embedding = AdaptiveEmbedding(self.bins, normal, normal, dtype)
        ties = self.tie_weights, self.tie_projections
        self.softmax = AdaptiveSoftmax(self.bins, *ties, normal, normal, normal, dtype)

    def __call__(self, ids_BT, h_ND, targets_N):
        return self.embedding(ids_BT), self.softmax(h_ND, targets_N, self.embedding)

    def log_probs(self, h_ND):
        return self.softmax.log_probs(h_ND, self.embedding)


def _module(name, **more):
    fields, *ties = CASES[name]
    fields = dict(vocab_size=V, d_model=D, d_embed=D) | fields | more
    return _Both(Bins(**fields), *ties)


@functools.cache
def _case(name):
    """(module, parameters, hidden vectors, every id and some more as targets)."""
    module, random = _module(name), np.random.default_rng(0)
    targets_N = np.concatenate([random.permutation(V), random.integers(V, size=N)])
    h_ND = random.normal(size=(len(targets_N), D)).astype(np.float32)
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), targets_N[None], h_ND, targets_N
    )
    params = jax.tree.map(
        lambda x: random.normal(size=x.shape).astype(np.float32), shapes["params"]
    )
    return module, params, h_ND, targets_N


def _weights(name):
    """Of each bin its table and its two projections, embedding's and softmax's."""
    module, params, _, _ = _case(name)
    bins, embedding, softmax = module.bins, params["embedding"], params["softmax"]
    source = embedding if module.tie_weights else softmax
    for b, (start, stop) in enumerate(zip(bins.edges, bins.edges[1:], strict=False)):
        rows = slice(start, stop) if bins.div_val == 1 else slice(None)
        table = "table" if bins.div_val == 1 else f"table_{b}"
        inward = embedding.get(f"projection_{0 if bins.div_val == 1 else b}", np.eye(D))
        tied = b < len(module.tie_projections) and module.tie_projections[b]
        # A projection that is tied where there is none is none.
        outward = inward.T if tied else softmax.get(f"projection_{b}", np.eye(D))
        tables = embedding[table][rows], source[table][rows]
        yield (start, stop), *tables, inward, outward


@pytest.mark.parametrize("name", CASES)
def test_embedding_and_softmax_equal_bin_after_bin(name):
    module, params, h_ND, targets_N = _case(name)
    variables = {"params": params}
    (y_BTD, nll_N) = jit(module.apply)(variables, targets_N[None], h_ND, targets_N)
    bias_V = params["softmax"]["bias"]
    rows_VD, kernels, biases = np.zeros((V, D)), [], []
    for (start, stop), table_in, table_out, inward, outward in _weights(name):
        rows_VD[start:stop] = table_in @ inward
        bias = bias_V[start:stop]
        if start == 0 and module.bins.n_tail:
            table_out = np.concatenate([table_out, params["softmax"]["cluster_kernel"]])
            bias = np.concatenate([bias, params["softmax"]["cluster_bias"]])
        kernels.append(outward @ table_out.T)
        biases.append(bias)
    np.testing.assert_allclose(y_BTD[0], rows_VD[targets_N], atol=1e-4)
    cutoffs = module.bins.cutoffs or (V,)
    expected_NV = reference.adaptive_log_probs(h_ND, kernels, biases, cutoffs)
    log_p_NV = jit(functools.partial(module.apply, method="log_probs"))(variables, h_ND)
    np.testing.assert_allclose(log_p_NV, expected_NV, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_p_NV).sum(1), 1, atol=1e-5)
    # In position order, whatever the order of the bins.
    at_N = expected_NV[np.arange(len(targets_N)), targets_N]
    np.testing.assert_allclose(nll_N, -at_N, atol=1e-4, rtol=1e-5)


def test_what_is_tied_has_no_parameter_of_its_own():
    def names(case):
        return {part: set(tree) for part, tree in _case(case)[1].items()}

    assert names("plain") == {"embedding": {"table"}, "softmax": {"bias"}}
    assert names("plain_untied") == {
        "embedding": {"table", "projection_0"},
        "softmax": {"table", "bias"},
    }
    tables = {f"{part}_{b}" for part in ("table", "projection") for b in range(3)}
    clusters = {"bias", "cluster_kernel", "cluster_bias"}
    assert names("div_4") == {
        "embedding": tables,
        "softmax": {"projection_0", *clusters},
    }
    assert names("div_4_same_width") == {
        "embedding": tables,
        "softmax": {*tables, *clusters},
    }
    unprojected = names("div_4_unprojected_head")
    assert "projection_0" not in unprojected["embedding"] | unprojected["softmax"]


def test_a_tied_table_learns_from_both_sides():
    module, params, h_ND, targets_N = _case("plain")

    def loss(params, embedding_weight, softmax_weight):
        y_BTD, nll_N = module.apply(
            {"params": params}, targets_N[None, :N], h_ND[:N], targets_N[:N]
        )
        return embedding_weight * y_BTD.sum() + softmax_weight * nll_N.sum()

    grad = jit(jax.grad(loss))

    def gradient(*weights):
        return np.asarray(grad(params, *weights)["embedding"]["table"])

    sides = gradient(1.0, 0.0), gradient(0.0, 1.0)
    assert all(side.any() for side in sides)
    np.testing.assert_allclose(gradient(1.0, 1.0), sum(sides), atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "bins", "div_4"])
def test_no_array_of_tokens_by_vocabulary(name):
    words, tokens = 30011, 13  # the plain softmax has chunks of 8192 words
    cutoffs = (2003, 10007) if CASES[name][0].get("cutoffs") else ()
    module = _module(name, vocab_size=words, cutoffs=cutoffs)
    ids_N = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    h_ND = jax.ShapeDtypeStruct((tokens, D), jnp.float32)

    def largest(function, *arguments):
        text = str(jax.make_jaxpr(function)(*arguments))
        shapes = re.findall(r"\w+\[([\d,]+)\]", text)
        shapes = [[int(n) for n in shape.split(",")] for shape in shapes]
        return max(np.prod(shape) for shape in shapes if tokens in shape)

    def init(key):
        zeros_N, zeros_ND = jnp.zeros(1, jnp.int32), jnp.zeros((1, D))
        return module.init(key, zeros_N[None], zeros_ND, zeros_N)

    variables = jax.eval_shape(init, jax.random.key(0))

    def loss(variables, h_ND, ids_N):
        return module.apply(variables, ids_N[None], h_ND, ids_N)[1].sum()

    log_probs = functools.partial(module.apply, method="log_probs")
    assert largest(log_probs, variables, h_ND) == tokens * words
    grad = jax.grad(loss, argnums=(0, 1))
    assert largest(grad, variables, h_ND, ids_N) <= tokens * 8192


def test_shapes_of_the_large_wikitext_tables():
    bins = Bins(267735, 1024, 1024, (20000, 40000, 200000), div_val=4)
    assert bins.tables == {
        "table_0": (20000, 1024),
        "table_1": (20000, 256),
        "table_2": (160000, 64),
        "table_3": (67735, 16),
    }
    assert [bins.projects(b) for b in range(4)] == [True] * 4


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_tokens_of_the_tails_stay_on_their_device(sizes):
    """Of a batch that the compiler has split, whatever a device's share of each bin."""
    module, params, _, _ = _case("div_4")
    random, mesh = np.random.default_rng(1), sharding.make_mesh(sizes)
    h_ND = random.normal(size=(24, D)).astype(np.float32)
    targets_N = np.sort(random.integers(V, size=24))  # some devices have no tail
    weights_N = random.normal(size=24).astype(np.float32)

    def loss(params, h_ND, targets_N):
        nll_N = module.apply({"params": params}, targets_N[None], h_ND, targets_N)[1]
        return (nll_N * weights_N).sum(), nll_N

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    expected = jit(grad)(params, h_ND, targets_N)
    rows = jax.sharding.NamedSharding(mesh, jax.P(sharding.RULES["batch"]))
    with jax.set_mesh(mesh):
        split = jit(grad, in_shardings=(None, rows, rows))
        program = split.lower(params, h_ND, targets_N).compile()
        found = split(params, h_ND, targets_N)
    lines = re.findall(r".* (?:all|collective|reduce)-\w+\(.*", program.as_text())
    assert lines and ("tensor" in sizes or "selected_nll" not in "".join(lines))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
