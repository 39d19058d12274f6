"""How much of every block, linear and row is pruned: the allocation."""

import math
from dataclasses import dataclass

import numpy as np

from neuroal_jax.models.family import Shapes

# Sparsity of a linear: one number for all its rows, or float64 [out].
Sparsity = float | np.ndarray


@dataclass(frozen=True)
class Allocation:
    """Sparsity of every linear: `blocks[b][linear]`, with the method that decided it."""

    method: str
    blocks: tuple[dict[str, Sparsity], ...]


def by_block(method: str, sparsities: list[float], linears: list[str]) -> Allocation:
    """One sparsity per block, shared by its linears."""
    return Allocation(method, tuple(dict.fromkeys(linears, float(s)) for s in sparsities))


def mean_sparsity(allocation: Allocation, shapes: Shapes) -> float:
    """The mean over all prunable weights."""
    pairs = [
        (float(np.mean(sparsity)), math.prod(shapes[linear]))
        for block in allocation.blocks
        for linear, sparsity in block.items()
    ]
    return sum(mean * size for mean, size in pairs) / sum(size for _, size in pairs)
