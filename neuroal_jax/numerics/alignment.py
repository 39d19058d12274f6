"""Neuron alignment: how much pruning changed the pattern of a linear's inputs (the paper's objective)."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def score(dense: Float[Array, "in"], pruned: Float[Array, "in"]) -> Float[Array, ""]:
    """`|| D/sum(D) - S/sum(S) ||_2 / dim(D)`, with D and S the input norms of the dense and the pruned run."""
    difference = _shares(dense) - _shares(pruned)
    return jnp.linalg.norm(difference) / dense.shape[0]


def _shares(norms: Float[Array, "in"]) -> Float[Array, "in"]:
    total = jnp.sum(norms)
    return jnp.where(total > 0, norms / jnp.where(total > 0, total, 1), 0)  # an input that pruning silenced
