"""MultiFlow (Farina et al., 2024): a weight matters by its size and by the flow through both its ends."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from neuroal_jax.pruners import wanda

prepare = wanda.prepare  # the input's norms


def scores(weight: Float[Array, "out in"], norms: Float[Array, "in"]) -> Float[Array, "out in"]:
    """`|W_ij| * o_i * p_j`, with o and p the row and column means of `|W_ij| * n_j`."""
    flow = wanda.scores(weight, norms)
    importance = jnp.mean(flow, axis=1)[:, None] * jnp.mean(flow, axis=0)[None, :]
    return jnp.abs(weight.astype(jnp.float32)) * importance
