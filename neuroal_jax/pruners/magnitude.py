"""Magnitude pruning: the smallest weights go."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from neuroal_jax.numerics.statistics import Statistics


def scores(weight: Float[Array, "out in"], statistics: Statistics) -> Float[Array, "out in"]:
    """`|W|`; the inputs play no part."""
    del statistics
    return jnp.abs(weight.astype(jnp.float32))
