"""Streamed reductions of a block's linear inputs; activations themselves are never stored. Always fp32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Inputs = dict[str, Float[Array, "sequence token width"]]


def squared_sums(inputs: Inputs) -> dict[str, Float[Array, "sequence width"]]:
    """Sum over each sequence's tokens of x_j squared, per input. Sums of batches of sequences simply concatenate."""
    return {name: jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1) for name, x in inputs.items()}


def norms(sums: dict[str, Float[Array, "sequence width"]]) -> dict[str, Float[Array, "width"]]:
    """`n_j = sqrt(1/N * sum over N sequences and all tokens of x_j^2)`: Wanda's column norm.

    The mean over sequences is a running one, rounded to fp32 after each, as in the released code: scores that almost
    tie then fall on the same side.
    """
    return {name: jnp.sqrt(_running_mean(s)) for name, s in sums.items()}


def _running_mean(values: Float[Array, "sequence width"]) -> Float[Array, "width"]:
    def step(mean: Array, item: tuple[Array, Array]) -> tuple[Array, None]:
        seen, value = item
        return mean * (seen / (seen + 1)) + jnp.square(jnp.sqrt(value)) / (seen + 1), None

    seen = jnp.arange(values.shape[0], dtype=jnp.float32)
    return jax.lax.scan(step, jnp.zeros(values.shape[1], jnp.float32), (seen, values))[0]
