"""Turning importances into densities: the one formula of the block step, the row step and their like."""

import numpy as np

LOWEST, HIGHEST = 0.01, 0.99  # the released code's guard on every allocation


def guarded(sparsities: np.ndarray) -> np.ndarray:
    """What leaves (0, 1) becomes 0.01 or 0.99; the rest stays."""
    return np.where(sparsities <= 0, LOWEST, np.where(sparsities >= 1, HIGHEST, sparsities))


def spread(sparsity: float, strength: float, importance: np.ndarray) -> np.ndarray:
    """Sparsities with the mean `sparsity` whose densities span `2 * strength` in proportion to `importance`.

    Density `(x - min x) / (max x - min x) * 2 * strength`, shifted to the mean `1 - sparsity`. The order of the
    operations is the released code's, so that the results are the same to the last bit.

    Args:
        sparsity: Mean of the result.
        strength: lambda.
        importance: float64 `[n]`; larger means denser.

    Returns:
        float64 `[n]`, unclipped; `sparsity` everywhere where all importances are equal.
    """
    span = np.ptp(importance)
    if span == 0:
        return np.full(len(importance), sparsity)
    density = (importance - importance.min()) * (2 * strength) / span
    return 1 - (density - density.mean() + (1 - sparsity))
