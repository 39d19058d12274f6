"""From fractions to whole numbers of weights: how many go in every row, or in every group of columns.

`exact` (the default) prunes exactly `round(sparsity * prunable weights)` of the model. `reference` rounds each row down
on its own, as the released code does, and so misses the target on narrow models.
"""

import math
from collections.abc import Mapping

import numpy as np

from neuroal_jax.allocation.allocation import Allocation, Sparsity
from neuroal_jax.allocation.spread import HIGHEST, LOWEST
from neuroal_jax.errors import UserError
from neuroal_jax.numerics.selection import TIES_ALL, TIES_HIGH, Quota

Shapes = Mapping[str, tuple[int, int]]
Counts = list[dict[str, Quota]]  # one entry per block


def count(allocation: Allocation, shapes: Shapes, budget: str, sparsity: float, group: int | None = None) -> Counts:
    """Whole numbers for every row of every linear, or for every group of `group` columns where that is given.

    Args:
        allocation: Fractions.
        shapes: `(out, in)` of each linear.
        budget: `exact` or `reference`.
        sparsity: Share of all weights to prune.
        group: Columns that compete with each other over all rows (SparseGPT).

    Raises:
        UserError: If the released code's rounding cannot express the allocation.
    """
    if budget == "reference":
        return reference_counts(allocation, shapes, group)
    return exact_counts(allocation, shapes, sparsity, group)


def prunable_weights(shapes: Shapes, num_blocks: int) -> int:
    """Number of weights in all linears of all blocks."""
    return num_blocks * sum(math.prod(shape) for shape in shapes.values())


def group_sizes(shape: tuple[int, int], group: int) -> list[int]:
    """Number of weights in each group of columns of a linear; the last group may be narrower."""
    out, width = shape
    return [out * min(group, width - start) for start in range(0, width, group)]


def reference_counts(allocation: Allocation, shapes: Shapes, group: int | None = None) -> Counts:
    """The released code's rounding.

    One number for a linear: `int(in * s)` go from each row. One number per row: `int(float32(1 - s) * in)` stay, and a
    stable descending sort decides which, so that of equal scores the lower index stays. In groups: everything up to the
    sorted score number `int(size * s)` goes, that score and its equals included.
    """

    def one(sparsity: Sparsity, shape: tuple[int, int]) -> Quota:
        out, width = shape
        if group is not None:
            if np.max(sparsity) >= 1:
                raise UserError(
                    f"the allocation asks for a sparsity of {np.max(sparsity):.4f} in one linear; the released code "
                    "fails there, so --budget reference cannot repeat it: use --budget exact"
                )
            last = [int(size * float(np.mean(sparsity))) for size in group_sizes(shape, group)]
            return Quota(np.array(last, np.int32) + 1, TIES_ALL)
        if isinstance(sparsity, np.ndarray):
            kept = (np.float32(1 - sparsity) * np.float32(width)).astype(np.int32)
            return Quota(np.asarray(width - kept, np.int32), TIES_HIGH)
        return Quota(np.full(out, min(width, int(width * sparsity)), np.int32))

    return [{linear: one(s, shapes[linear]) for linear, s in block.items()} for block in allocation.blocks]


def exact_counts(allocation: Allocation, shapes: Shapes, sparsity: float, group: int | None = None) -> Counts:
    """Counts that sum to exactly `round(sparsity * prunable weights)`.

    The allocation is first shifted so that its mean is `sparsity`; then the total becomes whole numbers by largest
    remainder: per block, within each block per linear, within each linear per row or group.
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
            {
                linear: _split(block[linear], shapes[linear], int(n), group)
                for linear, n in zip(linears, shares, strict=True)
            }
        )
    return counts


def _split(sparsity: Sparsity, shape: tuple[int, int], total: int, group: int | None) -> Quota:
    """Splits a linear's total over its rows or groups."""
    out, width = shape
    if group is not None:
        sizes = np.array(group_sizes(shape, group))
        return Quota(largest_remainder(sizes * (total / sizes.sum()), total, sizes).astype(np.int32))
    if isinstance(sparsity, np.ndarray):
        return Quota(largest_remainder(sparsity * width, total, [width] * out).astype(np.int32))
    each, left = divmod(total, out)  # equal rows: the first ones take what is left
    return Quota((each + (np.arange(out) < left)).astype(np.int32))


def largest_remainder(ideals: list[float] | np.ndarray, total: int, capacities: list[int] | np.ndarray) -> np.ndarray:
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
