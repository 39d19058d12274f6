"""Every row of a linear competes alone."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from neuroal_jax.masks.patterns import Shape
from neuroal_jax.numerics.rounding import largest_remainder
from neuroal_jax.numerics.selection import TIES_HIGH, Quota, select_smallest, zeros_first


@dataclass(frozen=True)
class Rows:
    """Every row competes alone: one number a row."""

    @property
    def steps(self) -> None:
        """Any number of weights may go."""

    @property
    def neighbours(self) -> None:
        """A weight changes places within its row."""

    def together(self, width: int) -> int:
        """A row is decided whole."""
        return width

    def split(self, sparsity: float | np.ndarray, shape: Shape, total: int, least: np.ndarray | None = None) -> Quota:
        """In proportion to the rows' sparsities; equal numbers where they are one, the first rows take what is left."""
        out, width = shape
        if isinstance(sparsity, np.ndarray):
            return Quota(largest_remainder(sparsity * width, total, [width] * out, least).astype(np.int32))
        each, left = divmod(total, out)
        equal = each + (np.arange(out) < left)
        if least is not None and np.any(equal < least):
            equal = largest_remainder(np.full(out, total / out), total, [width] * out, least)
        return Quota(equal.astype(np.int32))

    def count(self, packed: np.ndarray, shape: Shape) -> np.ndarray:
        """Of each row."""
        del shape
        return np.bitwise_count(packed).sum(axis=1, dtype=np.int64)

    def round_down(self, sparsity: float | np.ndarray, shape: Shape) -> Quota:
        """One number for a linear: `int(in * s)` go from each row.

        One number per row: `int(float32(1 - s) * in)` stay, and a stable descending sort decides which, so that of
        equal scores the lower index stays.
        """
        out, width = shape
        if isinstance(sparsity, np.ndarray):
            kept = (np.float32(1 - sparsity) * np.float32(width)).astype(np.int32)
            return Quota(np.asarray(width - kept, np.int32), TIES_HIGH)
        return Quota(np.full(out, min(width, int(width * sparsity)), np.int32))

    def select(self, scores: Float[Array, "out in"], quota: Quota) -> Bool[Array, "out in"]:
        """Marks the lowest scores of each row."""
        return select_smallest(zeros_first(scores, quota), quota)

    def select_columns(
        self, scores: Float[Array, "out in"], quota: Quota, number: Int[Array, ""] | int
    ) -> Bool[Array, "out in"]:
        """Marks the lowest scores of each row."""
        del number
        return select_smallest(scores, quota)


def make(size: int | None) -> Rows:
    """The pattern; rows have no size of their own."""
    del size
    return Rows()
