"""Row step: rows whose outputs pruning disturbs are kept denser, lambda says by how much."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from neuroal_jax.allocation.allocation import Allocation, Sparsity
from neuroal_jax.allocation.problem import Differences, Problem
from neuroal_jax.allocation.spread import HIGHEST, LOWEST, spread
from neuroal_jax.models.family import LinearSpec, Rows


def candidate(base: Allocation, strength: float, differences: Differences, problem: Problem) -> Allocation:
    """Spreads each linear's sparsity over its rows, by the `D - S` of the input which the rows become.

    The parts of a linear that is several in one are spread each on its own, all around the linear's sparsity: `D - S`
    of different inputs cannot be compared, and weights get the same rows however a checkpoint stores them. The last
    block, and linears whose `D - S` are all equal, keep their block's sparsity in every row.

    Args:
        base: The block step's winner (or the uniform allocation).
        strength: lambda.
        differences: `D - S` under `base`.
        problem: The model's linears. With a `reference` budget, what the released code does under grouped-query
            attention is repeated (the first `out` of the query heads' rows), and every row of every linear is listed.
            It knows no linears of several parts: these are treated as it would treat the parts.
    """
    family, reference, last = problem.family, problem.reference, len(base.blocks) - 1
    blocks: list[dict[str, Sparsity]] = []
    for b, sparsities in enumerate(base.blocks):
        block: dict[str, Sparsity] = {}
        for linear in family.linears:
            sparsity = float(np.mean(sparsities[linear.name]))
            alike = b == last or (reference and linear.name in family.reference_uniform)
            signals = [differences[min(b + part.feeds_next_block, last)][part.feeds] for part in linear.parts]
            signals = [u.astype(np.float64) * (not alike) for u in signals]
            if reference:
                block[linear.name] = _spread(linear, sparsity, strength, signals, problem.config)
            else:
                block[linear.name] = over_rows(linear, sparsity, strength, signals, problem.config)
        blocks.append(block)
    return Allocation("neuroal", tuple(blocks))


def over_rows(
    linear: LinearSpec, sparsity: float, strength: float, signals: Sequence[np.ndarray], config: Any
) -> Sparsity:
    """A linear's sparsity spread over its rows, each part on its own, within [0.01, 0.99].

    Args:
        linear: What it feeds.
        sparsity: Its mean.
        strength: lambda; 0 leaves one number for all rows, as do signals that are all equal.
        signals: Of each part, of the input that it feeds: larger is denser.
        config: The model's, for k/v heads that several query heads share.
    """
    signals = [_per_row(part, u, config) for part, u in zip(linear.parts, signals, strict=True)]
    if strength == 0 or not any(np.ptp(u) > 0 for u in signals):
        return sparsity
    return _spread(linear, sparsity, strength, signals, config)


def _spread(
    linear: LinearSpec, sparsity: float, strength: float, signals: Sequence[np.ndarray], config: Any
) -> np.ndarray:
    return _whole(linear, [np.clip(spread(sparsity, strength, u), LOWEST, HIGHEST) for u in signals], config)


def _per_row(part: Rows, u: np.ndarray, config: Any) -> np.ndarray:
    """One number for each row of a part, from those of the input that it feeds."""
    return pool_heads(u, config.num_key_value_heads, config.head_dim) if part.grouped else u


def pool_heads(u: np.ndarray, kv_heads: int, head_dim: int) -> np.ndarray:
    """Averages `[heads * head_dim]` over the query heads that share a key/value head: `[kv_heads * head_dim]`."""
    return u.reshape(kv_heads, -1, head_dim).mean(axis=1).reshape(-1)


def _whole(linear: LinearSpec, parts: list[np.ndarray], config: Any) -> np.ndarray:
    """A linear's rows `[out]` from those of its parts, of whose k/v heads only the first may be needed."""
    rows = [
        values[: config.num_key_value_heads * config.head_dim] if part.grouped else values
        for part, values in zip(linear.parts, parts, strict=True)
    ]
    if linear.interleaved:
        return np.concatenate([x.reshape(config.num_key_value_heads, -1) for x in rows], axis=1).reshape(-1)
    return np.concatenate(rows)
