"""NeuroAL's two searches, one after the other: lambda for the blocks, then lambda for the rows."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from neuroal_jax.allocation.allocation import Allocation, uniform
from neuroal_jax.errors import UserError
from neuroal_jax.masks.budget import Counts, count
from neuroal_jax.search import block_step, row_step
from neuroal_jax.walk.blocks import Walk


@dataclass(frozen=True)
class Lambdas:
    """The candidates of each step, in order; empty where the step is not searched."""

    block: tuple[float, ...]
    row: tuple[float, ...]

    @property
    def steps(self) -> list[int]:
        """Number of candidates of each step that is searched."""
        return [len(step) for step in (self.block, self.row) if step]


@dataclass(frozen=True)
class Found:
    """An allocation and how it was found.

    Attributes:
        allocation: The winner.
        lambda_block: Its lambda in NeuroAL's block step, if that was searched; `lambda_row` likewise.
        scores_block: Every candidate's score in order; `scores_row` likewise.
        alignment: Per block, what each linear adds to the winner's score; None without a search.
        measured: What other methods measured of every block, by name.
    """

    allocation: Allocation
    lambda_block: float | None = None
    lambda_row: float | None = None
    scores_block: list[float] = field(default_factory=list)
    scores_row: list[float] = field(default_factory=list)
    alignment: list[dict[str, float]] | None = None
    measured: dict[str, list[float | None]] = field(default_factory=dict)


def lambdas_for(step: str, block: str | tuple[float, ...], row: str | tuple[float, ...], sparsity: float) -> Lambdas:
    """Resolves the names of lambda sets for the steps that are searched."""
    block_set = block_step.lambda_set(block, sparsity) if isinstance(block, str) else block
    row_set = row_step.lambda_set(row) if isinstance(row, str) else row
    return Lambdas(() if step == "row" else block_set, () if step == "block" else row_set)


def search(
    walk: Walk,
    windows: np.ndarray,
    sparsity: float,
    lambdas: Lambdas,
    budget: str,
    batch: int,
    done: Callable[[int], object],
) -> Found:
    """Searches the allocation whose pruned activations stay most aligned with the dense ones.

    Args:
        walk: The model and the pruner.
        windows: Token ids `[n, tokens]`: the search set.
        sparsity: Share of weights to remove.
        lambdas: Candidates of each step.
        budget: `exact` or `reference`.
        batch: Candidates that run together.
        done: Told how many candidates went through a block, after each block.

    Returns:
        The winner: the smallest score, the first on a tie. Without a block step the base of the row step is uniform,
        and `scores_block` holds its score alone.
    """
    checkpoint = walk.checkpoint
    shapes = checkpoint.linear_shapes()
    linears = list(shapes)

    def counted(allocation: Allocation) -> Counts:
        return count(allocation, shapes, budget, sparsity, walk.spec.method.competing)

    def named(aligned: np.ndarray) -> list[dict[str, float]]:
        names = [linear.name for linear in checkpoint.family.linears]
        return [dict(zip(names, block, strict=True)) for block in aligned.tolist()]

    base, lambda_block, scores_block = uniform(sparsity, linears, checkpoint.num_blocks), None, []
    if lambdas.block:
        candidates = [block_step.candidate(sparsity, x, linears, checkpoint.num_blocks) for x in lambdas.block]
        aligned = walk.search(windows, [counted(candidate) for candidate in candidates], batch, done)
        scores_block = _scores(aligned)
        best = _best(scores_block, "block")
        base, lambda_block = candidates[best], lambdas.block[best]
        if not lambdas.row:
            return Found(base, lambda_block, None, scores_block, alignment=named(aligned[best]))
    # The winner walks once more, alone: its D - S then do not depend on which candidates it was batched with.
    alone, differences = walk.align(windows, counted(base), done)
    scores_block = scores_block or _scores(alone[None])
    model = (checkpoint.family, checkpoint.config)
    candidates = [row_step.candidate(base, x, differences, model, shapes, budget) for x in lambdas.row]
    aligned = walk.search(windows, [counted(candidate) for candidate in candidates], batch, done)
    scores_row = _scores(aligned)
    best = _best(scores_row, "row")
    return Found(candidates[best], lambda_block, lambdas.row[best], scores_block, scores_row, named(aligned[best]))


def _scores(aligned: np.ndarray) -> list[float]:
    """Every candidate's score, of its alignment `[candidate, block, linear]`."""
    return aligned.sum(axis=2).sum(axis=1).tolist()


def _best(scores: list[float], step: str) -> int:
    if not np.all(np.isfinite(scores)):
        raise UserError(f"scores of the {step} step are not finite: {scores}; try --dtype float32")
    return int(np.argmin(scores))


def work_units(lambdas: Lambdas, num_blocks: int) -> int:
    """How many times `search` reports a candidate through a block, in total."""
    return num_blocks * (sum(lambdas.steps) + bool(lambdas.row))
