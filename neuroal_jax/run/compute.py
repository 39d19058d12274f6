"""The computing middle of a run: perplexity before, allocation, pruning, perplexity after."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from neuroal_jax.allocation import ALLOCATIONS
from neuroal_jax.allocation.allocation import Allocation
from neuroal_jax.allocation.problem import Decision
from neuroal_jax.data.windows import Windows
from neuroal_jax.machine.memory import return_freed
from neuroal_jax.machine.programs import Trace, watched_traces
from neuroal_jax.resume.state import State
from neuroal_jax.run import console
from neuroal_jax.run.processes import begin_search
from neuroal_jax.run.progress import Clock, stage
from neuroal_jax.run.settle import SettledRun
from neuroal_jax.search.walked import WalkedModel
from neuroal_jax.walk import final
from neuroal_jax.walk.blocks import Blocks, batch_size
from neuroal_jax.walk.final import BlockResult, MoveUpdated
from neuroal_jax.walk.perplexity import perplexity, work


@dataclass(frozen=True)
class PrunedModel:
    """What a run computed.

    Attributes:
        decision: The allocation and how it was found.
        allocation: What was allocated to every linear, within the budget.
        blocks: Masks, and updated weights, of every block.
        zeros: Number of zeros that are written for every linear, per block.
        token_ppl: Every text's `dense` and `pruned` perplexity.
        traces: The programs that this run was the first to need.
    """

    decision: Decision
    allocation: Allocation
    blocks: list[BlockResult]
    zeros: list[dict[str, int]]
    token_ppl: dict[str, dict[str, float]]
    traces: list[Trace]


def compute(
    settled: SettledRun,
    candidate_batch: int,
    calibration: Windows,
    evaluations: Mapping[str, Windows],
    clock: Clock,
    move_updated: MoveUpdated,
    state: State,
) -> PrunedModel:
    """Perplexity before, allocation, pruning, perplexity after.

    Args:
        settled: The options and the model.
        candidate_batch: Candidates that run together.
        calibration: What statistics are collected on.
        evaluations: What perplexity is measured on, by label.
        clock: Takes the time of every phase.
        move_updated: What to do with the updated weights of every block.
        state: What is kept for --resume.

    Raises:
        UserError: If something is not finite on the way.
    """
    config, checkpoint, budget = settled.config, settled.checkpoint, settled.budget
    samples, seqlen = calibration.ids.shape
    token_ppl: dict[str, dict[str, float]] = {name: {} for name in evaluations}
    with watched_traces() as traces:
        blocks = Blocks(checkpoint, config.dtype, batch_size(seqlen, samples), state, settled.devices)

        def evaluate(model: str, results: list[BlockResult] | None) -> None:
            for name, windows in evaluations.items():
                title = f"{model} perplexity"
                with clock(f"perplexity_{model}"), stage(title, work(checkpoint), "weight") as advance:
                    token_ppl[name][model] = perplexity(blocks, windows.ids, results, advance)
                return_freed()  # what comes next has arrays of other sizes
                console.print_perplexity(model, token_ppl[name][model], windows)

        evaluate("dense", None)
        decision = _decide(settled, blocks, calibration.ids, candidate_batch, clock)
        counts = budget.counts(decision.allocation)
        with clock("prune"), stage("prune", checkpoint.num_blocks, "block") as advance:
            results = final.prune(blocks, settled.method, calibration.ids, counts, advance, move_updated, budget.zeros)
        allocation = budget.fit(decision.allocation)
        zeros = [_zeros(result, budget.shapes) for result in results]
        console.print_damping(results)
        console.print_blocks(allocation, [sum(block.values()) for block in zeros], budget.shapes)
        evaluate("pruned", results)
    return PrunedModel(decision, allocation, results, zeros, token_ppl, traces)


def _decide(settled: SettledRun, blocks: Blocks, windows: np.ndarray, candidate_batch: int, clock: Clock) -> Decision:
    """How much of every block and row goes, as the file says or by the method that was asked for."""
    config, budget = settled.config, settled.budget
    if settled.given is not None:
        return Decision(settled.given)
    search_set, fitted = windows[: config.search_samples], windows[config.search_samples :]
    fitted_on = fitted if config.search_refine else None
    if config.searches:
        if settled.helpers is not None:
            begin_search(settled.helpers, blocks.batch, search_set, fitted_on)
        console.warn_of_few_tokens(search_set.size, config.objective)
    model = WalkedModel(
        blocks,
        settled.method,
        budget,
        config.objective,
        windows,
        search_set,
        candidate_batch,
        lambda title, total, unit: stage(f"search: {title}", total, unit),
        fitted_on,
        settled.helpers,
    )
    with clock("search"):
        decision: Decision = ALLOCATIONS.module(config.allocation).allocate(model.problem(config.plain()))
    console.print_search(decision, config.objective)
    return decision


def _zeros(result: BlockResult, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Number of zeros that are written for every linear of a block: pruned weights, and kept ones that are zero."""
    return {
        linear: math.prod(shapes[linear]) - int(np.bitwise_count(packed).sum()) + result.kept_zeros[linear]
        for linear, packed in result.packed.items()
    }
