"""Every few neighbouring inputs of a row compete: N of M stay, of all groups of a linear the same N."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from neuroal_jax.errors import UserError
from neuroal_jax.masks.patterns import Shape
from neuroal_jax.numerics.selection import Quota, select_smallest, zeros_first

_MOST_COMPARED = 32  # in groups of more, comparing all pairs takes longer than a radix select


@dataclass(frozen=True)
class NofM:
    """Groups of `size` neighbours in a row compete. One number for all groups of a linear: how many of each go.

    What is zero in the checkpoint goes first, but a group with more zeros than go keeps the others of them.
    """

    size: int

    @property
    def steps(self) -> int:
        """A linear's number goes up in so many steps, one for each weight of a group."""
        return self.size

    @property
    def neighbours(self) -> int:
        """A weight changes places within its group."""
        return self.size

    def together(self, width: int) -> int:
        """So many columns are decided at a time."""
        del width
        return self.size

    def split(self, sparsity: float | np.ndarray, shape: Shape, total: int, least: np.ndarray | None = None) -> Quota:
        """The same number for all groups.

        Raises:
            ValueError: If `total` is not as many for each.
        """
        del sparsity, least
        each, left = divmod(total, math.prod(shape) // self.size)
        if left:
            raise ValueError(f"{total} weights are not equally many of every {self.size} in {shape}")
        return Quota(np.array([each], np.int32))

    def count(self, packed: np.ndarray, shape: Shape) -> np.ndarray:
        """Of each group."""
        bits = np.unpackbits(packed, axis=1, count=shape[1])
        return bits.reshape(-1, self.size).sum(axis=1, dtype=np.int64)

    def round_down(self, sparsity: float | np.ndarray, shape: Shape) -> Quota:
        """Raises UserError: the released code prunes no groups."""
        raise UserError(f"--budget reference has no groups of {self.size}: use --budget exact")

    def select(self, scores: Float[Array, "out in"], quota: Quota) -> Bool[Array, "out in"]:
        """Marks the lowest scores of each group; of equal ones the first."""
        groups = zeros_first(scores, quota).reshape(-1, self.size)
        number = jnp.asarray(quota.pruned)[0]
        if self.size > _MOST_COMPARED:
            chosen = select_smallest(groups, Quota(jnp.broadcast_to(number, len(groups)), quota.ties))
        else:
            chosen = (_ranks(groups.T) < number).T
        return chosen.reshape(scores.shape)

    def select_columns(
        self, scores: Float[Array, "out size"], quota: Quota, number: Int[Array, ""] | int
    ) -> Bool[Array, "out size"]:
        """Marks the lowest scores of the groups in the columns from `number * size` on."""
        del number
        return self.select(scores, Quota(quota.pruned))


def _ranks(scores: Float[Array, "size group"]) -> Int[Array, "size group"]:
    """Of each score how many of its group come before it: smaller ones, and equal ones with a lower index."""
    places = jnp.arange(len(scores))[:, None]
    before = [(other < scores) | ((other == scores) & (place < places)) for place, other in enumerate(scores)]
    return sum((found.astype(jnp.int32) for found in before), start=jnp.zeros(scores.shape, jnp.int32))


def make(size: int | None) -> NofM:
    """The pattern with groups of `size`."""
    if size is None:
        raise ValueError("groups of neighbours need a size")
    return NofM(size)
