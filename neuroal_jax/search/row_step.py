"""Row step: rows whose outputs pruning disturbs are kept denser, lambda says by how much."""

import numpy as np

from neuroal_jax.allocation.allocation import Allocation, Sparsity
from neuroal_jax.allocation.problem import Differences, Problem
from neuroal_jax.allocation.spread import HIGHEST, LOWEST, spread


def candidate(base: Allocation, strength: float, differences: Differences, problem: Problem) -> Allocation:
    """Spreads each linear's sparsity over its rows, by the `D - S` of the input which the rows become.

    The last block, and linears whose `D - S` are all equal, keep their block's sparsity in every row.

    Args:
        base: The block step's winner (or the uniform allocation).
        strength: lambda.
        differences: `D - S` under `base`.
        problem: The model's linears. With a `reference` budget, what the released code does under grouped-query
            attention is repeated (the first `out` of the query heads' rows), and every row of every linear is listed.
    """
    family, config, reference = problem.family, problem.config, problem.reference
    blocks: list[dict[str, Sparsity]] = []
    for b, sparsities in enumerate(base.blocks):
        block: dict[str, Sparsity] = {}
        for linear in family.linears:
            out = problem.shapes[linear.name][0]
            sparsity = float(np.mean(sparsities[linear.name]))
            u = np.zeros(out)
            left_out = reference and linear.name in family.reference_uniform
            if b + 1 < len(base.blocks) and not left_out:
                u = differences[b + linear.feeds_next_block][linear.feeds].astype(np.float64)
            if linear.grouped and not reference:
                u = pool_heads(u, config.num_key_value_heads, config.head_dim)
            if reference or (strength > 0 and np.ptp(u) > 0):
                block[linear.name] = np.clip(spread(sparsity, strength, u), LOWEST, HIGHEST)[:out]
            else:
                block[linear.name] = sparsity
        blocks.append(block)
    return Allocation("neuroal", tuple(blocks))


def pool_heads(u: np.ndarray, kv_heads: int, head_dim: int) -> np.ndarray:
    """Averages `[heads * head_dim]` over the query heads that share a key/value head: `[kv_heads * head_dim]`."""
    return u.reshape(kv_heads, -1, head_dim).mean(axis=1).reshape(-1)
