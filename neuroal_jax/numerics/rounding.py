"""Fractions to whole numbers."""

import numpy as np


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
