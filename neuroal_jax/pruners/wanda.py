"""Wanda (Sun et al., 2024): a weight matters by its size times the norm of the input it multiplies."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def scores(weight: Float[Array, "out in"], norms: Float[Array, "in"]) -> Float[Array, "out in"]:
    """`|W_ij| * n_j`."""
    return jnp.abs(weight.astype(jnp.float32)) * norms
