"""From fractions to whole numbers of weights: how many go of every set of competitors.

`exact` (the default) leaves exactly `round(sparsity * prunable weights)` zeros in what is written. Weights that are
zero in the checkpoint are among them: they go before all others, and every set of competitors loses at least its zeros.
`reference` rounds each row down on its own, as the released code does, and so misses the target on narrow models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from neuroal_jax.allocation.allocation import Allocation, Sparsity
from neuroal_jax.allocation.spread import HIGHEST, LOWEST
from neuroal_jax.errors import UserError
from neuroal_jax.masks.patterns import Pattern
from neuroal_jax.models.family import Shapes
from neuroal_jax.numerics.rounding import largest_remainder
from neuroal_jax.numerics.selection import Counts, Quota

EXACT, REFERENCE = "exact", "reference"


def prunable_weights(shapes: Shapes, num_blocks: int) -> int:
    """Number of weights in all linears of all blocks."""
    return num_blocks * sum(math.prod(shape) for shape in shapes.values())


@dataclass(frozen=True)
class Budget:
    """How many weights of a model go.

    Attributes:
        shapes: `(out, in)` of each linear of a block.
        num_blocks: Number of blocks.
        sparsity: Share of all prunable weights.
        kind: `exact` or `reference`.
        pattern: Which weights compete.
        zeros: Where the checkpoint is zero, by block and linear, packed as masks are (see `Checkpoint.zeros`); empty
            where it is nowhere.

    Raises:
        UserError: If an `exact` budget asks for fewer zeros than there are.
    """

    shapes: Shapes
    num_blocks: int
    sparsity: float
    kind: str
    pattern: Pattern
    zeros: Sequence[Mapping[str, np.ndarray]] = ()

    def __post_init__(self) -> None:
        """Checks that the zeros that there are fit in."""
        if self.kind == EXACT and self.total < self.source_zeros:
            raise UserError(
                f"--sparsity {self.sparsity:g} leaves {self.total} zeros, but {self.source_zeros} of the model's "
                f"{self.prunable} prunable weights are zero already ({self.source_zeros / self.prunable:.6f}), and "
                "pruning brings none back: ask for more, or prune the model that this one was made from"
            )

    @property
    def prunable(self) -> int:
        """Number of weights in all linears of all blocks."""
        return prunable_weights(self.shapes, self.num_blocks)

    @property
    def total(self) -> int:
        """Number of zeros to have in the end; what a `reference` budget gives is only close to it."""
        return round(self.sparsity * self.prunable)

    @cached_property
    def source_zeros(self) -> int:
        """Number of prunable weights that are zero in the checkpoint."""
        return sum(int(np.bitwise_count(packed).sum()) for block in self.zeros for packed in block.values())

    def fit(self, allocation: Allocation) -> Allocation:
        """The allocation shifted so that its mean is the sparsity; as it is under a `reference` budget."""
        return shifted(allocation, self.shapes, self.sparsity) if self.kind == EXACT else allocation

    def counts(self, allocation: Allocation) -> Counts:
        """Whole numbers for every set of competitors of every linear.

        `exact`: the fitted allocation becomes numbers that sum to exactly `total` by largest remainder: per block,
        within each block per linear, within each linear as the pattern splits; nowhere fewer than the zeros there.

        Raises:
            UserError: If the released code's rounding cannot express the allocation.
        """
        if self.kind == REFERENCE:
            return [
                {linear: self.pattern.round_down(s, self.shapes[linear]) for linear, s in block.items()}
                for block in allocation.blocks
            ]
        blocks = self.fit(allocation).blocks
        sizes = {linear: math.prod(shape) for linear, shape in self.shapes.items()}
        ideals = [{linear: float(np.mean(s)) * sizes[linear] for linear, s in block.items()} for block in blocks]
        block_size = sum(sizes.values())
        of_linears = [{linear: int(sets.sum()) for linear, sets in block.items()} for block in self._least]
        of_blocks = [sum(block.values()) for block in of_linears] or None
        totals = largest_remainder(
            [sum(ideal.values()) for ideal in ideals], self.total, [block_size] * len(blocks), of_blocks
        )
        counts = []
        for number, (block, ideal, block_total) in enumerate(zip(blocks, ideals, totals, strict=True)):
            linears = list(ideal)
            least = [of_linears[number][linear] for linear in linears] if of_linears else None
            shares = largest_remainder(
                list(ideal.values()), int(block_total), [sizes[linear] for linear in linears], least
            )
            counts.append(
                {
                    linear: self._quota(number, linear, block[linear], int(n))
                    for linear, n in zip(linears, shares, strict=True)
                }
            )
        return counts

    def _quota(self, block: int, linear: str, sparsity: Sparsity, total: int) -> Quota:
        if not self.zeros:
            return self.pattern.split(sparsity, self.shapes[linear], total)
        quota = self.pattern.split(sparsity, self.shapes[linear], total, self._least[block][linear])
        return quota._replace(zeros=self.zeros[block][linear])

    @cached_property
    def _least(self) -> list[dict[str, np.ndarray]]:
        """Zeros of the checkpoint in every set of competitors, by block and linear."""
        return [
            {linear: self.pattern.count(packed, self.shapes[linear]) for linear, packed in block.items()}
            for block in self.zeros
        ]


def shifted(allocation: Allocation, shapes: Shapes, sparsity: float) -> Allocation:
    """Shifts an allocation, clipping to [0.01, 0.99], until its mean over all weights is `sparsity`.

    Where `sparsity` itself, or a number given by hand, lies outside of these bounds, the bounds widen to include it.
    """
    entries = [(block, linear) for block in range(len(allocation.blocks)) for linear in allocation.blocks[block]]
    parts = [np.atleast_1d(allocation.blocks[block][linear]) for block, linear in entries]
    values = np.concatenate(parts)
    values = np.where(values > 1, HIGHEST, values)  # the released AlphaPruning's may be
    row_weights = [math.prod(shapes[linear]) / len(part) for (_, linear), part in zip(entries, parts, strict=True)]
    weights = np.repeat(row_weights, [len(part) for part in parts])
    weights /= weights.sum()
    low, high = min(LOWEST, sparsity, values.min()), max(HIGHEST, sparsity, values.max())

    def gap(shift: float) -> float:
        return float(weights @ np.clip(values + shift, low, high)) - sparsity

    if abs(gap(0.0)) < 1e-12:
        return allocation
    below, above = low - values.max(), high - values.min()
    for _ in range(100):
        middle = (below + above) / 2
        below, above = (middle, above) if gap(middle) < 0 else (below, middle)
    fitted = np.clip(values + (below + above) / 2, low, high)
    pieces = np.split(fitted, np.cumsum([len(part) for part in parts])[:-1])
    blocks: list[dict[str, Sparsity]] = [{} for _ in allocation.blocks]
    for (block, linear), piece in zip(entries, pieces, strict=True):
        is_rows = isinstance(allocation.blocks[block][linear], np.ndarray)
        blocks[block][linear] = piece if is_rows else float(piece[0])
    return Allocation(allocation.method, tuple(blocks))
