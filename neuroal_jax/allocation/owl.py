"""OWL (Yin et al., 2024): blocks with more outliers among their Wanda scores are kept denser."""

import numpy as np

from neuroal_jax.allocation.allocation import Allocation, by_block
from neuroal_jax.allocation.spread import guarded, spread


def allocation(sparsity: float, strength: float, outliers: list[float], linears: list[str]) -> Allocation:
    """Densities that span `2 * strength` in proportion to the blocks' outlier ratios.

    Args:
        sparsity: Mean of the result, before the guard.
        strength: lambda.
        outliers: Percentage of outliers of each block, in the dense model.
        linears: Names of a block's linears.
    """
    return by_block("owl", guarded(spread(sparsity, strength, np.array(outliers))).tolist(), linears)
