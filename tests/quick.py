"""jax.jit for tests: programs that run once compile in a fifth of the time."""

import functools

import jax

# Measured on 2 cores, jax 0.10: 0.13 s for 0.6 s (two layers, forward).
_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
}


@functools.cache
def compiler_options() -> dict:
    """{} where this version of XLA has other names for them."""
    try:
        jax.jit(lambda x: x, compiler_options=_OPTIONS)(0.0)
    except Exception:  # Any: it is only about speed.
        return {}
    return _OPTIONS


def jit(function, **options):
    return jax.jit(function, compiler_options=compiler_options(), **options)
