"""Fractions to whole numbers."""

import numpy as np


def largest_remainder(
    ideals: list[float] | np.ndarray,
    total: int,
    capacities: list[int] | np.ndarray,
    least: list[int] | np.ndarray | None = None,
) -> np.ndarray:
    """Whole numbers close to `ideals` that sum to `total`.

    Each gets its ideal rounded down; what is missing goes one by one to the largest remainders, on a tie to the first.
    Where lower bounds leave no such numbers near the ideals, all are first moved by one share of their upper bounds.

    Args:
        ideals: Non-negative numbers; without lower bounds their sum is close to `total`.
        total: What the result sums to; from the sum of `least` to the sum of `capacities`.
        capacities: Upper bound of each.
        least: Lower bound of each; by default 0.
    """
    ideal = np.asarray(ideals, dtype=np.float64)
    capacity = np.asarray(capacities, dtype=np.int64)
    floor = np.zeros_like(capacity) if least is None else np.asarray(least, dtype=np.int64)
    if least is not None and (np.any(ideal < floor) or abs(ideal.sum() - total) >= len(ideal)):
        ideal = _bounded(ideal, total, floor, capacity)
    whole = np.clip(np.floor(ideal), floor, capacity).astype(np.int64)
    missing = total - int(whole.sum())
    while missing:
        step = 1 if missing > 0 else -1
        open_ = np.flatnonzero(whole < capacity if step > 0 else whole > floor)
        order = open_[np.argsort(-step * (ideal - whole)[open_], kind="stable")]
        chosen = order[: abs(missing)]
        whole[chosen] += step
        missing -= step * len(chosen)
    return whole


def _bounded(ideal: np.ndarray, total: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Numbers within bounds that sum to `total`: the ideals, shifted by one share of their upper bounds."""
    below, above = -1.0, 1.0
    for _ in range(60):  # by bisection, to the last bits
        middle = (below + above) / 2
        enough = np.clip(ideal + middle * high, low, high).sum() >= total
        below, above = (below, middle) if enough else (middle, above)
    return np.clip(ideal + above * high, low, high)
