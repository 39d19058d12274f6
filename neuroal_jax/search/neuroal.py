"""NeuroAL: search lambda for the blocks, then for the rows, by neuron alignment (the paper's section 3)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from neuroal_jax.allocation import uniform
from neuroal_jax.allocation.problem import Candidate, Decision, Problem, Scores
from neuroal_jax.errors import IllegalCombination, UserError
from neuroal_jax.search import block_step, row_step
from neuroal_jax.search.lambdas import Lambdas, lambdas_for


def allocate(problem: Problem) -> Decision:
    """Searches the allocation whose pruned activations stay most aligned with the dense ones.

    Returns:
        The winner: the smallest score, the first on a tie. Without a block step the base of the row step is uniform,
        and the block step's only candidate, without a lambda.

    Raises:
        UserError: If a score is not finite.
    """
    lambdas, linears, blocks = _lambdas(problem.options, problem.sparsity), problem.linears, problem.num_blocks
    stages: dict[str, list[Candidate]] = {}
    chosen: dict[str, dict[str, float]] = {}
    base = uniform.allocation(problem.sparsity, linears, blocks)
    if lambdas.block:
        candidates = [block_step.candidate(problem.sparsity, x, linears, blocks) for x in lambdas.block]
        scores = problem.model.score("block step", candidates)
        stages["block"] = _scored(scores, lambdas.block)
        best = _best(stages["block"], "block")
        base, chosen["block"] = candidates[best], {"lambda": lambdas.block[best]}
        if not lambdas.row:
            return Decision(base, stages, chosen, _by_name(scores, best, linears))
    # The winner walks once more, alone: its D - S then do not depend on which candidates it was batched with.
    alone, differences = problem.model.align(base)
    if not lambdas.block:
        stages["block"] = _scored(alone or problem.model.score("uniform", [base]), (None,))
    candidates = [row_step.candidate(base, x, differences, problem) for x in lambdas.row]
    scores = problem.model.score("row step", candidates)
    stages["row"] = _scored(scores, lambdas.row)
    best = _best(stages["row"], "row")
    chosen["row"] = {"lambda": lambdas.row[best]}
    return Decision(candidates[best], stages, chosen, _by_name(scores, best, linears))


def stage_sizes(options: Mapping[str, Any], sparsity: float) -> list[int]:
    """Number of candidates of each step that is searched."""
    return _lambdas(options, sparsity).steps


def lone_walks(options: Mapping[str, Any]) -> int:
    """How many times one candidate walks alone: the base of a row step, for what pruning it changes."""
    return 0 if options["step"] == "block" else 1


def settle(options: Mapping[str, Any], rows_alike: str) -> dict[str, Any]:
    """Without rows to tell apart, both steps become the block step.

    Args:
        options: All options of the run by name.
        rows_alike: Why rows cannot be told apart.

    Raises:
        IllegalCombination: If only the row step was asked for.
    """
    if options["step"] == "block":
        return {}
    if options["step"] == "row":
        raise IllegalCombination(f"--step row does not go with rows that are all alike: {rows_alike}; use --step block")
    return {"step": "block"}


def _lambdas(options: Mapping[str, Any], sparsity: float) -> Lambdas:
    return lambdas_for(options["step"], options["block_lambdas"], options["row_lambdas"], sparsity)


def _scored(scores: Scores, lambdas: tuple[float | None, ...]) -> list[Candidate]:
    pairs = zip(lambdas, scores.totals.tolist(), strict=True)
    return [Candidate({"lambda": strength}, score) for strength, score in pairs]


def _best(candidates: list[Candidate], step: str) -> int:
    scores = [candidate.score for candidate in candidates]
    if not np.all(np.isfinite(scores)):
        raise UserError(f"scores of the {step} step are not finite: {scores}; try --dtype float32")
    return int(np.argmin(scores))


def _by_name(scores: Scores, candidate: int, linears: list[str]) -> list[dict[str, float]] | None:
    """What each linear adds to a candidate's score, per block; None where the score is no sum over linears."""
    if scores.of_linears is None:
        return None
    return [dict(zip(linears, block, strict=True)) for block in scores.of_linears[candidate].tolist()]
