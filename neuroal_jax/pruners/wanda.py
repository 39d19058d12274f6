"""Wanda (Sun et al., 2024): a weight matters by its size times the norm of the input it multiplies."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from neuroal_jax.numerics.statistics import Statistics
from neuroal_jax.numerics.statistics import norms as input_norms


def prepare(statistics: Statistics) -> Float[Array, "in"]:
    """The input's norms."""
    return input_norms(statistics["squares"])


def scores(weight: Float[Array, "out in"], norms: Float[Array, "in"]) -> Float[Array, "out in"]:
    """`|W_ij| * n_j`."""
    return jnp.abs(weight.astype(jnp.float32)) * norms
