"""Streamed reductions of a block's linear inputs; activations themselves are never stored. Always fp32."""

import jax.numpy as jnp
from jaxtyping import Array, Float

Inputs = dict[str, Float[Array, "sequence token width"]]


def squared_sums(inputs: Inputs) -> dict[str, Float[Array, "sequence width"]]:
    """Sum over each sequence's tokens of x_j squared, per input. Sums of batches of sequences simply concatenate."""
    return {name: jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1) for name, x in inputs.items()}


def norms(sums: dict[str, Float[Array, "sequence width"]]) -> dict[str, Float[Array, "width"]]:
    """`n_j = sqrt(1/N * sum over N sequences and all tokens of x_j^2)`: Wanda's column norm."""
    return {name: jnp.sqrt(jnp.mean(s, axis=0)) for name, s in sums.items()}
