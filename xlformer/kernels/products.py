"""Products of two arrays, with gradients as matrix units and a CPU want them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def wide(dtype) -> jnp.dtype:
    """What exponents and sums are computed in: float32, or more if `dtype` is."""
    return jnp.promote_types(dtype, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum of two arrays of one dtype with sums in `wide`.

    Each array ends with the two letters of a matrix; those before are of the batch, the
    same in all three.
    """
    return jnp.einsum(spec, a, b, preferred_element_type=wide(a.dtype))


def _save(spec, a, b):
    return product(spec, a, b), (a, b)


def _backward(spec, saved, d):
    # Autodiff would multiply in d's dtype, float32, whatever that of a and b, and would
    # make the gradient of b, and of an a that is turned, the wrong way round: features
    # are the largest arrays there are, and turning them costs a CPU as much as their
    # exponentials.
    a, b = saved
    letters_a, letters_b, letters = spec.replace("->", ",").split(",")
    d = d.astype(a.dtype)

    def gradient(of, other, x):
        pairs = [(letters, d), (other, x)]
        if of[-2] in other:
            pairs.reverse()
        names, arrays = zip(*pairs, strict=True)
        return jnp.einsum(
            f"{','.join(names)}->{of}", *arrays, preferred_element_type=wide(x.dtype)
        )

    da, db = gradient(letters_a, letters_b, b), gradient(letters_b, letters_a, a)
    return da.astype(a.dtype), db.astype(b.dtype)


product.defvjp(_save, _backward)
