"""Cases for the attention operation, and the check of one implementation on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import reference
from jax import jit
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xlformer import sharding
from xlformer.kernels.relative_attention import relative_attention, visible_attention
from xlformer.kernels.visibility import Visibility

FIELDS = [field.name for field in dataclasses.fields(Visibility)]
NAMES = ("qu_BTHK", "qw_BTHK", "k_BSHK", "v_BSHK", "r_SHK")


def make_arrays(
    *, B=2, T=5, M=7, H=3, K=5, R=None, causal=True, dtype=np.float32, seed=0
):
    """The five array arguments; R is the width of (qw, r)."""
    random, S = np.random.default_rng(seed), M + T
    rows = S if causal else S + T - 1
    shapes = (
        (B, T, H, K),
        (B, T, H, R or K),
        (B, S, H, K),
        (B, S, H, K),
        (rows, H, R or K),
    )
    return [random.normal(size=shape).astype(dtype) for shape in shapes]


# (B, T) = (2, 5) and M = 7: three valid slots in row 0, none in row 1.
PARTLY = np.array([[4] * 5, [7] * 5])
RESETS = {
    "at_0": np.array([[7] * 5, [0] * 5]),
    "inside": np.array([[0, 0, 9, 9, 9], [2, 8, 8, 8, 8]]),
    "last": np.array([[0, 0, 0, 0, 11], [0] * 5]),
    "two": np.array([[0, 8, 8, 10, 10], [3, 3, 3, 10, 11]]),
}
CASES = {
    **reference.RULES,
    "head_size_7": dict(K=7),
    "one_query": dict(T=1, M=11),
    "no_memory": dict(T=7, M=0),
    "memory_shorter": dict(T=7, M=3),
    "memory_longer": dict(T=3, M=13),
    "wider_positions": dict(R=6),
    "no_positions": dict(r=False),
    "bidirectional_one_query": dict(causal=False, T=1, M=3),
    "bidirectional_window_memory_shorter": dict(causal=False, window=2, T=7, M=3),
    "bidirectional_no_positions": dict(causal=False, r=False),
    "partly_filled": dict(key_start_BT=PARTLY),
    "partly_filled_window": dict(key_start_BT=PARTLY, window=5),
    **{f"reset_{name}": dict(key_start_BT=start) for name, start in RESETS.items()},
}


def split(case):
    """(arrays, options of the operation) of a case."""
    case = dict(case)
    options = {k: case.pop(k) for k in FIELDS if k in case}
    case["causal"] = options.get("causal", True)
    relative = case.pop("r", True)
    arrays = make_arrays(**case)
    if not relative:
        arrays[1] = arrays[4] = None
    return arrays, options


def values_and_gradients(arrays, implementation, **options):
    """y and the gradients of (y * dy).sum(), compiled; dy is random."""
    dy_BTHK = np.random.default_rng(1).normal(size=arrays[0].shape)

    visibility = Visibility(**{k: options.pop(k) for k in FIELDS if k in options})

    def loss(arrays):
        y_BTHK = visible_attention(
            *arrays, visibility, implementation=implementation, **options
        )
        return (y_BTHK * dy_BTHK.astype(y_BTHK.dtype)).sum(), y_BTHK

    (_, y_BTHK), grads = jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return y_BTHK, grads


def check_against_double_loop(implementation, name):
    arrays, options = split(CASES[name])
    y_BTHK, grads = values_and_gradients(arrays, implementation, **options)
    assert y_BTHK.dtype == jnp.float32
    exact = [None if x is None else x.astype(np.float64) for x in arrays]
    dy_BTHK = np.random.default_rng(1).normal(size=y_BTHK.shape)
    expected = reference.attention_gradients(dy_BTHK, *exact, **options)
    expected_BTHK = reference.attention(*exact, **options)
    check_close(y_BTHK, grads, expected_BTHK, expected)


def check_close(y_BTHK, grads, expected_BTHK, expected, tolerance=1e-5):
    np.testing.assert_allclose(y_BTHK, expected_BTHK, atol=tolerance, rtol=tolerance)
    for argument, actual, array in zip(NAMES, grads, expected, strict=True):
        if array is None:
            assert actual is None
            continue
        np.testing.assert_allclose(
            actual,
            array,
            atol=tolerance,
            rtol=tolerance,
            err_msg=f"gradient of {argument}",
        )


def check_no_gradient_crosses(implementation, name):
    """Of a query's output to keys and values before its start: exactly 0."""
    start_BT = RESETS[name]
    arrays = make_arrays()
    B, T, H, K = arrays[0].shape

    def loss(k_BSHK, v_BSHK, weights_BT):
        qu_BTHK, qw_BTHK, _, _, r_SHK = arrays
        y_BTHK = relative_attention(
            qu_BTHK,
            qw_BTHK,
            k_BSHK,
            v_BSHK,
            r_SHK,
            key_start_BT=start_BT,
            implementation=implementation,
        )
        return (y_BTHK * weights_BT[..., None, None]).sum()

    grad = jit(jax.grad(loss, argnums=(0, 1)))
    for t in range(T):
        weights_BT = np.zeros((B, T), np.float32)
        weights_BT[:, t] = 1
        for g_BSHK in map(np.asarray, grad(arrays[2], arrays[3], weights_BT)):
            for b in range(B):
                start, end = start_BT[b, t], 7 + t
                assert not g_BSHK[b, :start].any() and not g_BSHK[b, end + 1 :].any()
        # The values' gradient is the probability: it is the last one of the two.
        assert (g_BSHK[0, start_BT[0, t] : 7 + t + 1] > 0).all()


def probabilities(implementation, *, rate, key, T=11, M=6, H=2, B=2):
    """[B, T, H, S] after dropout, seen through values that are one-hot."""
    S = M + T
    arrays = make_arrays(B=B, T=T, M=M, H=H, K=S)
    one_hot_SS = np.eye(S, dtype=np.float32)
    arrays[3] = np.broadcast_to(one_hot_SS[None, :, None], arrays[3].shape)

    def apply(arrays, key):
        return relative_attention(
            *arrays, dropout_rate=rate, dropout_key=key, implementation=implementation
        )

    return np.asarray(jit(apply)(arrays, key))


def starts(B, T, M, at):
    """Resets of row 0 at these queries; row 1 has 2 valid slots of memory."""
    start_BT = np.zeros((B, T), np.int32)
    for t in at:
        start_BT[0, t:] = M + t
    start_BT[1:] = max(M - 2, 0)
    return start_BT


# (T, M, K, tile of queries, of keys, options): ragged, longer than each other, wholly
# out of sight.
TILES = [
    (37, 21, 80, 8, 24, {}),
    (29, 50, 64, 8, 16, dict(window=11)),
    (40, 0, 41, 16, 16, dict(at=(0, 17, 39))),
    (33, 47, 128, 8, 32, dict(at=(9, 10), window=40)),
]


def check_tiles(implementation, T, M, K, options):
    """Against `xla`, with dropout and one more column of positions."""
    options = dict(options)
    if "at" in options:
        options["key_start_BT"] = starts(2, T, M, options.pop("at"))
    options |= dict(
        dropout_rate=0.25, dropout_key=jax.random.split(jax.random.key(1), 2)
    )
    arrays = make_arrays(T=T, M=M, K=K, R=K + 1, H=2)
    arrays = [x / K**0.25 for x in arrays]  # scores of about 1 at any width
    found = values_and_gradients(arrays, implementation, **options)
    check_close(*found, *values_and_gradients(arrays, "xla", **options))


def check_bfloat16(implementation):
    """At most twice as far from float32 as `xla` in bfloat16."""
    exact = make_arrays(T=20, M=12, K=16)
    low = [jnp.asarray(x / 2, jnp.bfloat16) for x in exact]
    found = values_and_gradients(low, implementation)
    plain = values_and_gradients(low, "xla")
    best = values_and_gradients([x.astype(jnp.float32) for x in low], "xla")
    leaves = map(jax.tree.leaves, (found, plain, best))
    for actual, other, exact in zip(*leaves, strict=True):
        assert actual.dtype == jnp.bfloat16
        error = np.abs(np.asarray(actual, np.float32) - exact).max()
        assert error < 2 * np.abs(np.asarray(other, np.float32) - exact).max()


def check_over_mesh(implementation, *, B, manual):
    """2 x 2 x 2 devices against one; with `manual`, `data` is already split around."""
    T, M, H = 10, 7, 4
    arrays = make_arrays(B=B, T=T, M=M, H=H)
    dy_BTHK = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)
    rows = {
        "arrays": arrays[:4],
        "dy": dy_BTHK,
        "start": starts(B, T, M, (3, 9)),
        "keys": jax.random.split(jax.random.key(0), B),
    }

    def both(rows, r_SHK, implementation):
        def forward(arrays):
            return relative_attention(
                *arrays,
                key_start_BT=rows["start"],
                dropout_rate=0.2,
                dropout_key=rows["keys"],
                implementation=implementation,
            )

        y_BTHK, vjp = jax.vjp(forward, [*rows["arrays"], r_SHK])
        *grads, dr_SHK = vjp(rows["dy"])[0]
        return y_BTHK, grads, dr_SHK

    def on_mesh(rows, r_SHK):
        if not manual:
            return both(rows, r_SHK, implementation)

        def local(rows, r_SHK):
            y_BTHK, grads, dr_SHK = both(rows, r_SHK, implementation)
            return y_BTHK, grads, jax.lax.psum(dr_SHK, "data")

        return jax.shard_map(
            local,
            in_specs=(P("data"), P()),
            out_specs=(P("data"), P("data"), P()),
            axis_names={"data"},
            check_vma=False,
        )(rows, r_SHK)

    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    def put(x):
        names = ("batch", None, "heads", None)[: x.ndim]
        return jax.device_put(
            x, NamedSharding(mesh, sharding.spec(x.shape, names, mesh.shape))
        )

    split = jax.tree.map(put, rows)
    with jax.set_mesh(mesh):
        found = jit(on_mesh)(split, arrays[4])
    expected = jit(both, static_argnums=2)(rows, arrays[4], "xla")
    for actual, array in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(actual, array, atol=1e-5, rtol=1e-5)
