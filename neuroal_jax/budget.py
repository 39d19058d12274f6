"""From fractions to whole numbers of weights: how many go in every row.

`exact` (the default) prunes exactly `round(sparsity * prunable weights)` of the model. `reference` rounds each row down
on its own, as the released code does, and so misses the target on narrow models.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from neuroal_jax.allocation import Allocation, Sparsity
from neuroal_jax.allocation.spread import HIGHEST, LOWEST

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class RowCounts:
    """How many weights of each row of a linear are pruned (int32 [out]), and which of equal scores go first."""

    pruned: np.ndarray
    ties_high: bool = False


Counts = list[dict[str, RowCounts]]  # one entry per block


def count(allocation: Allocation, shapes: Shapes, budget: str, sparsity: float) -> Counts:
    """Whole numbers for every row, under `budget` = `exact` or `reference`."""
    if budget == "reference":
        return reference_counts(allocation, shapes)
    return exact_counts(allocation, shapes, sparsity)


def prunable_weights(shapes: Shapes, num_blocks: int) -> int:
    """Number of weights in all linears of all blocks."""
    return num_blocks * sum(math.prod(shape) for shape in shapes.values())


def zeros_of(counts: Counts) -> int:
    """Number of weights that counts prune in the whole model."""
    return sum(int(rows.pruned.sum()) for block in counts for rows in block.values())


def reference_counts(allocation: Allocation, shapes: Shapes) -> Counts:
    """The released code's rounding.

    One number for a linear: `int(in * s)` go from each row. One number per row: `int(float32(1 - s) * in)` stay, and a
    stable descending sort decides which, so that of equal scores the lower index stays.
    """

    def rows(sparsity: Sparsity, shape: tuple[int, int]) -> RowCounts:
        out, width = shape
        if isinstance(sparsity, np.ndarray):
            kept = (np.float32(1 - sparsity) * np.float32(width)).astype(np.int32)
            return RowCounts(np.asarray(width - kept, np.int32), ties_high=True)
        return RowCounts(np.full(out, int(width * sparsity), np.int32))

    return [{linear: rows(s, shapes[linear]) for linear, s in block.items()} for block in allocation.blocks]


def exact_counts(allocation: Allocation, shapes: Shapes, sparsity: float) -> Counts:
    """Counts that sum to exactly `round(sparsity * prunable weights)`.

    The allocation is first shifted so that its mean is `sparsity`; then the total becomes whole numbers by largest
    remainder: per block, within each block per linear, within each linear per row.
    """
    blocks = fit_mean(allocation, shapes, sparsity).blocks
    total = round(sparsity * prunable_weights(shapes, len(blocks)))
    sizes = {linear: math.prod(shape) for linear, shape in shapes.items()}
    ideals = [{linear: float(np.mean(s)) * sizes[linear] for linear, s in block.items()} for block in blocks]
    block_size = sum(sizes.values())
    totals = largest_remainder([sum(ideal.values()) for ideal in ideals], total, [block_size] * len(blocks))
    counts = []
    for block, ideal, block_total in zip(blocks, ideals, totals, strict=True):
        linears = list(ideal)
        shares = largest_remainder(list(ideal.values()), int(block_total), [sizes[linear] for linear in linears])
        counts.append(
            {linear: _spread(block[linear], shapes[linear], int(n)) for linear, n in zip(linears, shares, strict=True)}
        )
    return counts


def _spread(sparsity: Sparsity, shape: tuple[int, int], total: int) -> RowCounts:
    out, width = shape
    if isinstance(sparsity, np.ndarray):
        return RowCounts(largest_remainder(sparsity * width, total, [width] * out).astype(np.int32))
    each, left = divmod(total, out)  # equal rows: the first ones take what is left
    return RowCounts((each + (np.arange(out) < left)).astype(np.int32))


def largest_remainder(ideals: list[float] | np.ndarray, total: int, capacities: list[int]) -> np.ndarray:
    """Whole numbers close to `ideals` that sum to `total`.

    Each gets its ideal rounded down; what is missing goes one by one to the largest remainders, on a tie to the first.

    Args:
        ideals: Non-negative numbers whose sum is close to `total`.
        total: What the result sums to; at most the sum of `capacities`.
        capacities: Upper bound of each.
    """
    ideal = np.asarray(ideals, dtype=np.float64)
    capacity = np.asarray(capacities, dtype=np.int64)
    whole = np.clip(np.floor(ideal), 0, capacity).astype(np.int64)
    missing = total - int(whole.sum())
    while missing:
        step = 1 if missing > 0 else -1
        open_ = np.flatnonzero(whole < capacity if step > 0 else whole > 0)
        order = open_[np.argsort(-step * (ideal - whole)[open_], kind="stable")]
        chosen = order[: abs(missing)]
        whole[chosen] += step
        missing -= step * len(chosen)
    return whole


def fit_mean(allocation: Allocation, shapes: Shapes, sparsity: float) -> Allocation:
    """Shifts an allocation, clipping to [0.01, 0.99], until its mean over all weights is `sparsity`.

    Where `sparsity` itself, or a number given by hand, lies outside of these bounds, the bounds widen to include it.
    """
    entries = [(block, linear) for block in range(len(allocation.blocks)) for linear in allocation.blocks[block]]
    parts = [np.atleast_1d(allocation.blocks[block][linear]) for block, linear in entries]
    values = np.concatenate(parts)
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
