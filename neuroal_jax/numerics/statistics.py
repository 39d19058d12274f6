"""Streamed reductions of a block's linear inputs; activations themselves are never stored. Always fp32."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Inputs = dict[str, Float[Array, "sequence token width"]]


class Statistics(NamedTuple):
    """Reductions of one linear input x over the tokens of each sequence.

    A field that nobody asked for is None; the types say what it is for those who did.

    Attributes:
        squares: Sum of x_j^2 (Wanda's norms, the alignment).
        sums: Sum of x_j (DSnoT).
        variances: Population variance of x_j (DSnoT).
        hessian: `2/N * sum over N sequences of X^T X` (SparseGPT).
    """

    squares: Float[Array, "sequence width"] = None  # type: ignore[assignment]
    sums: Float[Array, "sequence width"] = None  # type: ignore[assignment]
    variances: Float[Array, "sequence width"] = None  # type: ignore[assignment]
    hessian: Float[Array, "width width"] = None  # type: ignore[assignment]


def collect(inputs: Inputs, wanted: Iterable[str]) -> dict[str, Statistics]:
    """Of the fields of `Statistics`, those `wanted` that are reductions of single sequences, for every input."""
    reductions = {
        "squares": lambda x: jnp.sum(jnp.square(x), axis=1),
        "sums": lambda x: jnp.sum(x, axis=1),
        "variances": lambda x: jnp.var(x, axis=1),
    }
    fields = [field for field in reductions if field in wanted]
    return {
        name: Statistics(**{field: reductions[field](x.astype(jnp.float32)) for field in fields})
        for name, x in inputs.items()
    }


def add_to_hessian(
    hessian: Float[Array, "width width"],
    x: Float[Array, "sequence token width"],
    first: Int[Array, ""] | int,
    total: Int[Array, ""] | int,
) -> Float[Array, "width width"]:
    """The Hessian `2/N * sum X^T X` of the sequences so far, and of these ones too.

    It is a running mean over sequences, in the released code's order of operations: what SparseGPT prunes where
    saliencies almost tie, and so everything after that, hangs on the last bits.

    Args:
        hessian: Of the sequences before these; zeros if there are none.
        x: Activations.
        first: How many sequences came before.
        total: How many there are in all; what lies beyond only fills up a batch and is left out.
    """

    def step(hessian: Array, item: tuple[Array, Array]) -> tuple[Array, None]:
        seen, tokens = item
        scaled = jnp.sqrt(2 / (seen + 1)) * tokens.astype(jnp.float32)
        product = jnp.matmul(scaled.T, scaled, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(seen < total, hessian * (seen / (seen + 1)) + product, hessian), None

    seen = jnp.arange(x.shape[0], dtype=jnp.float32) + first
    return jax.lax.scan(step, hessian, (seen, x))[0]


def hessian(x: Float[Array, "sequence token width"]) -> Float[Array, "width width"]:
    """`2/N * sum over N sequences of X^T X`."""
    return add_to_hessian(jnp.zeros((x.shape[2], x.shape[2])), x, 0, x.shape[0])


def norms(squares: Float[Array, "sequence width"]) -> Float[Array, "width"]:
    """`n_j = sqrt(1/N * sum over N sequences and all tokens of x_j^2)`: Wanda's column norm."""
    return jnp.sqrt(running_mean(jnp.square(jnp.sqrt(squares))))


def running_mean(values: Float[Array, "sequence width"]) -> Float[Array, "width"]:
    """The mean over sequences, rounded to fp32 after each, as in the released code.

    Scores that almost tie then fall on the same side.
    """

    def step(mean: Array, item: tuple[Array, Array]) -> tuple[Array, None]:
        seen, value = item
        return mean * (seen / (seen + 1)) + value / (seen + 1), None

    seen = jnp.arange(values.shape[0], dtype=jnp.float32)
    return jax.lax.scan(step, jnp.zeros(values.shape[1], jnp.float32), (seen, values))[0]
