"""From fractions to whole numbers of weights: how many go of every set of competitors.

`exact` (the default) leaves exactly `round(sparsity * prunable weights)` zeros in what is written. Weights that are
zero in the checkpoint are among them: they go before all others, and every set of competitors loses at least its zeros.
`reference` rounds each row down on its own, as the released code does, and so misses the target on narrow models.

Where N of M neighbours stay, every block has one N: `exact` then prunes the number of weights that comes closest, and
a group that has more zeros in the checkpoint than weights that go keeps the others of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from neuroal_jax.allocation.allocation import Allocation, Sparsity, by_block
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
        UserError: If an `exact` budget asks for fewer zeros than there are, or a pattern cannot prune so many.
    """

    shapes: Shapes
    num_blocks: int
    sparsity: float
    kind: str
    pattern: Pattern
    zeros: Sequence[Mapping[str, np.ndarray]] = ()

    def __post_init__(self) -> None:
        """Checks that the zeros that there are fit in, and that groups of neighbours can lose so many."""
        steps = self.pattern.steps
        if steps is not None and self.total * steps > (steps - 1) * self.prunable:
            raise UserError(
                f"a sparsity of {self.sparsity:g} is more than groups of {steps} can lose, of which at least one "
                f"weight stays: at most {1 - 1 / steps:g}"
            )
        if steps is not None and not self.total:
            raise UserError(
                f"a sparsity of {self.sparsity:g} prunes nothing: the least that one block can lose is 1 of every "
                f"{steps} weights, {1 / steps / self.num_blocks:.4g} of the model"
            )
        if self.kind == EXACT and self.pattern.steps is None and self.total < self.source_zeros:
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
        """Number of zeros to have in the end; what a `reference` budget gives is only close to it.

        Of groups of neighbours, the number of weights that go.
        """
        steps = self.pattern.steps
        if steps is None:
            return round(self.sparsity * self.prunable)
        return whole_steps(self.sparsity, self.num_blocks, steps) * (self.prunable // (self.num_blocks * steps))

    def is_met(self, zeros: int, kept_zeros: int) -> bool:
        """Whether a result is what it should be; one of a `reference` budget need not be.

        Args:
            zeros: Number of zeros of the pruned model.
            kept_zeros: Of these, how many are kept weights.
        """
        if self.kind == REFERENCE:
            return True
        return self.total == (zeros if self.pattern.steps is None else zeros - kept_zeros)

    @cached_property
    def source_zeros(self) -> int:
        """Number of prunable weights that are zero in the checkpoint."""
        return sum(int(np.bitwise_count(packed).sum()) for block in self.zeros for packed in block.values())

    def fit(self, allocation: Allocation) -> Allocation:
        """The allocation shifted so that its mean is the sparsity; as it is under a `reference` budget.

        Where a pattern has steps, every block's mean goes to a whole one of them.
        """
        if self.kind != EXACT:
            return allocation
        fitted = shifted(allocation, self.shapes, self.sparsity)
        return fitted if self.pattern.steps is None else stepped(fitted, self.shapes, self.sparsity, self.pattern.steps)

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
        least = self._least[block][linear] if self._least else None
        quota = self.pattern.split(sparsity, self.shapes[linear], total, least)
        return quota._replace(zeros=self.zeros[block][linear])

    @cached_property
    def _least(self) -> list[dict[str, np.ndarray]]:
        """Zeros of the checkpoint in every set of competitors, by block and linear; empty where they do not decide."""
        if self.pattern.steps is not None:
            return []
        return [
            {linear: self.pattern.count(packed, self.shapes[linear]) for linear, packed in block.items()}
            for block in self.zeros
        ]


def whole_steps(sparsity: float, num_blocks: int, steps: int) -> int:
    """How many steps all blocks together go up to come closest to a sparsity."""
    return round(sparsity * num_blocks * steps)


def stepped(allocation: Allocation, shapes: Shapes, sparsity: float, steps: int) -> Allocation:
    """The allocation with every block's mean at a whole number of steps, by largest remainder, for all its linears.

    Args:
        allocation: With the mean `sparsity` over all weights.
        shapes: `(out, in)` of each linear.
        sparsity: Of the whole model.
        steps: From nothing to everything; one is always kept.
    """
    sizes = {linear: math.prod(shape) for linear, shape in shapes.items()}
    means = [
        sum(float(np.mean(s)) * sizes[linear] for linear, s in block.items()) / sum(sizes.values())
        for block in allocation.blocks
    ]
    total = whole_steps(sparsity, len(means), steps)
    whole = largest_remainder([mean * steps for mean in means], total, [steps - 1] * len(means))
    return by_block(allocation.method, [n / steps for n in whole.tolist()], [*shapes])


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
