"""All rows of a group of columns compete."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from neuroal_jax.errors import UserError
from neuroal_jax.masks.patterns import Shape
from neuroal_jax.numerics.rounding import largest_remainder
from neuroal_jax.numerics.selection import TIES_ALL, Quota, select_smallest, zeros_first


@dataclass(frozen=True)
class ColumnGroups:
    """All rows of `size` neighbouring columns compete; the last group may be narrower. One number a group."""

    size: int

    @property
    def steps(self) -> None:
        """Any number of weights may go."""

    @property
    def neighbours(self) -> None:
        """A weight changes places within its row."""

    def together(self, width: int) -> int:
        """So many columns are decided at a time."""
        return min(self.size, width)

    def sizes(self, shape: Shape) -> np.ndarray:
        """Number of weights in each group."""
        out, width = shape
        return np.array([out * min(self.size, width - start) for start in range(0, width, self.size)])

    def split(self, sparsity: float | np.ndarray, shape: Shape, total: int, least: np.ndarray | None = None) -> Quota:
        """In proportion to the groups' sizes, whatever the rows' sparsities."""
        del sparsity
        sizes = self.sizes(shape)
        return Quota(largest_remainder(sizes * (total / sizes.sum()), total, sizes, least).astype(np.int32))

    def count(self, packed: np.ndarray, shape: Shape) -> np.ndarray:
        """Of each group."""
        width = shape[1]
        of_columns = np.unpackbits(packed, axis=1, count=width).sum(axis=0, dtype=np.int64)
        return np.add.reduceat(of_columns, np.arange(0, width, self.size))

    def round_down(self, sparsity: float | np.ndarray, shape: Shape) -> Quota:
        """Everything up to the sorted score number `int(size * s)` goes, that score and its equals included.

        Raises:
            UserError: For a sparsity of 1 or more, of which there is no such score.
        """
        if np.max(sparsity) >= 1:
            raise UserError(
                f"the allocation asks for a sparsity of {np.max(sparsity):.4f} in one linear; the released code "
                "fails there, so --budget reference cannot repeat it: use --budget exact"
            )
        last = [int(size * float(np.mean(sparsity))) for size in self.sizes(shape).tolist()]
        return Quota(np.array(last, np.int32) + 1, TIES_ALL)

    def select(self, scores: Float[Array, "out in"], quota: Quota) -> Bool[Array, "out in"]:
        """Marks the lowest scores of each group; of equal ones, those of the upper rows first."""
        out, width = scores.shape
        scores = zeros_first(scores, quota)
        padded = jnp.pad(scores, ((0, 0), (0, -width % self.size)), constant_values=jnp.inf)
        groups = padded.reshape(out, -1, self.size).transpose(1, 0, 2)
        chosen = select_smallest(groups.reshape(len(groups), -1), quota)
        return chosen.reshape(-1, out, self.size).transpose(1, 0, 2).reshape(out, -1)[:, :width]

    def select_columns(
        self, scores: Float[Array, "out size"], quota: Quota, number: Int[Array, ""] | int
    ) -> Bool[Array, "out size"]:
        """Marks the lowest scores of group `number`."""
        of_group = Quota(jnp.asarray(quota.pruned)[number][None], quota.ties)
        return select_smallest(scores.reshape(1, -1), of_group).reshape(scores.shape)


def make(size: int | None) -> ColumnGroups:
    """The pattern with `size` columns a group."""
    if size is None:
        raise ValueError("groups of columns need a size")
    return ColumnGroups(size)
