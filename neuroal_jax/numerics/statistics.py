"""Streamed reductions of one input of linears; activations themselves are never stored. Always fp32."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Statistics = Mapping[str, Array]  # of one input, by the names in `STATISTICS`


@runtime_checkable
class Statistic(Protocol):
    """A reduction that takes its input in batches of sequences, in order."""

    def init(self, sequences: int, width: int) -> Array:
        """What `update` begins with, for an input of this width; `sequences` includes what fills up the last batch."""

    def update(
        self,
        state: Array,
        x: Float[Array, "sequence token width"],
        first: Int[Array, ""] | int,
        total: Int[Array, ""] | int,
    ) -> Array:
        """The state with a batch taken in; `first` sequences came before, and from `total` on they only fill it up."""

    def finish(self, state: Array, total: int) -> Array:
        """The reduction over the first `total` sequences."""


@dataclass(frozen=True)
class PerSequence:
    """A reduction over the tokens of each sequence, `[sequence, width]`.

    Attributes:
        reduce: fp32 `[sequence, token, width]` to `[sequence, width]`.
    """

    reduce: Callable[[Float[Array, "sequence token width"]], Float[Array, "sequence width"]]

    def init(self, sequences: int, width: int) -> Float[Array, "sequence width"]:
        """Zeros."""
        return jnp.zeros((sequences, width), jnp.float32)

    def update(
        self,
        state: Float[Array, "all width"],
        x: Float[Array, "sequence token width"],
        first: Int[Array, ""] | int,
        total: Int[Array, ""] | int,
    ) -> Float[Array, "all width"]:
        """Writes the rows of these sequences."""
        del total
        return jax.lax.dynamic_update_slice_in_dim(state, self.reduce(x.astype(jnp.float32)), first, 0)

    def finish(self, state: Float[Array, "all width"], total: int) -> Float[Array, "total width"]:
        """Without the rows that only filled up the last batch."""
        return state[:total]


@dataclass(frozen=True)
class Hessian:
    """`2/N * sum over N sequences of X^T X`, `[width, width]`.

    A running mean over sequences, in the released code's order of operations: what SparseGPT prunes where saliencies
    almost tie, and so everything after that, hangs on the last bits.
    """

    def init(self, sequences: int, width: int) -> Float[Array, "width width"]:
        """Zeros."""
        del sequences
        return jnp.zeros((width, width), jnp.float32)

    def update(
        self,
        state: Float[Array, "width width"],
        x: Float[Array, "sequence token width"],
        first: Int[Array, ""] | int,
        total: Int[Array, ""] | int,
    ) -> Float[Array, "width width"]:
        """The Hessian of the sequences so far, and of these ones too."""

        def step(hessian: Array, item: tuple[Array, Array]) -> tuple[Array, None]:
            seen, tokens = item
            scaled = jnp.sqrt(2 / (seen + 1)) * tokens.astype(jnp.float32)
            product = jnp.matmul(scaled.T, scaled, precision=jax.lax.Precision.HIGHEST)
            return jnp.where(seen < total, hessian * (seen / (seen + 1)) + product, hessian), None

        seen = jnp.arange(x.shape[0], dtype=jnp.float32) + first
        return jax.lax.scan(step, state, (seen, x))[0]

    def finish(self, state: Float[Array, "width width"], total: int) -> Float[Array, "width width"]:
        """Itself."""
        del total
        return state


SUMS: dict[str, Hessian] = {"hessian": Hessian()}  # over sequences, so that their order counts
STATISTICS: dict[str, Statistic] = {
    "squares": PerSequence(lambda x: jnp.sum(jnp.square(x), axis=1)),  # Wanda's norms, the alignment
    "sums": PerSequence(lambda x: jnp.sum(x, axis=1)),
    "variances": PerSequence(lambda x: jnp.var(x, axis=1)),  # of the population
    **SUMS,
}


def measure(x: Float[Array, "sequence token width"], wanted: Iterable[str]) -> dict[str, Array]:
    """The statistics `wanted` of an input that is there as a whole."""
    sequences, _, width = x.shape

    def whole(statistic: Statistic) -> Array:
        return statistic.finish(statistic.update(statistic.init(sequences, width), x, 0, sequences), sequences)

    return {name: whole(STATISTICS[name]) for name in sorted(wanted)}


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
