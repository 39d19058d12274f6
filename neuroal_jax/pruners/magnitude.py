"""Magnitude pruning: the smallest weights go."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def scores(weight: Float[Array, "out in"], norms: Float[Array, "in"]) -> Float[Array, "out in"]:
    """`|W|`; the inputs play no part."""
    del norms
    return jnp.abs(weight.astype(jnp.float32))
