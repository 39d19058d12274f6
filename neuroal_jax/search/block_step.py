"""Block step: sparsity rises linearly with depth, lambda says how steeply."""

import numpy as np

from neuroal_jax.allocation.allocation import Allocation, by_block
from neuroal_jax.allocation.spread import guarded, spread

PAPER = (0.01, 0.02, 0.03, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.20, 0.25)
REFERENCE = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.20, 0.25)


def lambda_set(name: str, sparsity: float) -> tuple[float, ...]:
    """The paper's set, or the released code's (`reference`), which leaves 0.25 out from 80% sparsity on."""
    if name == "paper":
        return PAPER
    return REFERENCE[:-1] if sparsity >= 0.8 else REFERENCE


def candidate(sparsity: float, strength: float, linears: list[str], num_blocks: int) -> Allocation:
    """Block b of L gets `s - lambda + 2 * lambda * b / (L - 1)`; what leaves (0, 1) becomes 0.01 or 0.99.

    A model of one block keeps `s`.
    """
    shallow_first = np.arange(num_blocks - 1, -1, -1, dtype=np.float64)
    return by_block("neuroal", guarded(spread(sparsity, strength, shallow_first)).tolist(), linears)
