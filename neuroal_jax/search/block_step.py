"""Block step: sparsity rises linearly with depth, lambda says how steeply."""

import numpy as np

from neuroal_jax.allocation.allocation import Allocation, by_block
from neuroal_jax.allocation.spread import guarded, spread


def candidate(sparsity: float, strength: float, linears: list[str], num_blocks: int) -> Allocation:
    """Block b of L gets `s - lambda + 2 * lambda * b / (L - 1)`; what leaves (0, 1) becomes 0.01 or 0.99.

    A model of one block keeps `s`.
    """
    shallow_first = np.arange(num_blocks - 1, -1, -1, dtype=np.float64)
    return by_block("neuroal", guarded(spread(sparsity, strength, shallow_first)).tolist(), linears)
