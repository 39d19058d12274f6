"""The model that an allocation asks: measurements and scores by walking its blocks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import numpy as np

from neuroal_jax.allocation.allocation import Allocation
from neuroal_jax.allocation.problem import Differences, Measurement, Norms, Problem, Scores
from neuroal_jax.masks.budget import Budget
from neuroal_jax.numerics.kl import Dense
from neuroal_jax.search.objective import OBJECTIVES
from neuroal_jax.search.shared import Helpers
from neuroal_jax.walk import head, measure, perplexity, refined_search, search
from neuroal_jax.walk.blocks import Advance, Blocks
from neuroal_jax.walk.method import Method

Stage = Callable[[str, int, str], AbstractContextManager[Advance]]  # of a title, a total and its unit


@dataclass(frozen=True)
class WalkedModel:
    """`allocation.problem.Model` on the blocks of a checkpoint.

    Attributes:
        blocks: The model.
        method: How weights are chosen.
        budget: How many go.
        objective: Name of what candidates are scored by.
        calibration: Token ids `[n, tokens]`, for measurements.
        search_set: Token ids `[n, tokens]`, for scores.
        candidate_batch: Candidates that run together.
        stage: Begins what others may follow, as `run.progress.stage` does: a walk.
        fitted: Token ids `[m, tokens]` that candidates are refined on before they are scored; None: they are not.
        helpers: Other processes, which score a part of the candidates; None: there are none.
    """

    blocks: Blocks
    method: Method
    budget: Budget
    objective: str
    calibration: np.ndarray
    search_set: np.ndarray
    candidate_batch: int
    stage: Stage
    fitted: np.ndarray | None = None
    helpers: Helpers | None = None

    def measure(
        self, label: str, needs: Sequence[str], of_block: Measurement, settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """See `allocation.problem.Model`."""
        with self.stage(label, self.budget.num_blocks, "block") as advance:
            return measure.measure(self.blocks, label, self.calibration, needs, of_block, advance, settings)

    def score(self, stage: str, candidates: Sequence[Allocation]) -> Scores:
        """See `allocation.problem.Model`."""
        together = self.candidate_batch if len(candidates) > 1 else 1
        if self.helpers is None or len(candidates) == 1:
            return self.score_here(stage, candidates, together)
        if OBJECTIVES[self.objective].against_dense:
            _ = self._dense  # walks first: a run that goes on finds its walks in this order
        # Hidden states of candidates are in several processes: only the scores of a whole stage are kept.
        steps = self.blocks.begin_whole("scores-of-all")
        if steps.outputs:
            return Scores(**steps.outputs[0])
        here = partial(self.score_here, blocks=self.blocks.unkept())
        scores = self.helpers.score(stage, candidates, together, here)
        steps.record(0, [], scores.arrays)
        return scores

    def score_here(
        self, stage: str, candidates: Sequence[Allocation], together: int, blocks: Blocks | None = None
    ) -> Scores:
        """Scores of candidates by this process alone; `together` of them run at a time, through these blocks."""
        blocks = blocks or self.blocks
        counts = [self.budget.counts(candidate) for candidate in candidates]
        entry = OBJECTIVES[self.objective]
        if not entry.reads_head:
            with self.stage(stage, self.budget.num_blocks * len(counts), "candidate-block") as advance:
                return search.score(blocks, self.method, self._code.score, self.search_set, counts, together, advance)
        dense = self._dense if entry.against_dense else None
        if self.fitted is not None:
            with self.stage(stage, perplexity.work(blocks.checkpoint) * len(counts), "weight") as advance:
                return refined_search.score(
                    blocks, self.method, self._code, dense, self.fitted, self.search_set, counts, advance
                )
        with self.stage(stage, search.work(blocks.checkpoint, self.method) * len(counts), "weight") as advance:
            return search.score_by_head(
                blocks, self.method, self._code, dense, self.search_set, counts, together, advance
            )

    def align(self, candidate: Allocation) -> tuple[Scores | None, Differences]:
        """See `allocation.problem.Model`."""
        objective = None if OBJECTIVES[self.objective].reads_head else self._code.score
        with self.stage("alignment", self.budget.num_blocks, "block") as advance:
            counts = self.budget.counts(candidate)
            return search.align(self.blocks, self.method, objective, self.search_set, counts, advance)

    def problem(self, options: Mapping[str, Any]) -> Problem:
        """What an allocation decides about this model, given all options of the run by name."""
        budget, checkpoint = self.budget, self.blocks.checkpoint
        return Problem(
            sparsity=budget.sparsity,
            num_blocks=budget.num_blocks,
            shapes=budget.shapes,
            family=checkpoint.family,
            config=checkpoint.config,
            options=options,
            model=self,
        )

    @cached_property
    def _dense(self) -> Dense:
        """The dense model's distributions on the search set: one walk for all stages."""
        with self.stage("dense distributions", perplexity.work(self.blocks.checkpoint), "weight") as advance:
            return head.dense_distributions(self.blocks, self.search_set, advance)

    def dense_norms(self, candidate: Allocation) -> Norms:
        """See `allocation.problem.Model`."""
        with self.stage("norms", self.budget.num_blocks, "block") as advance:
            return search.dense_norms(self.blocks, self.method, self.search_set, self.budget.counts(candidate), advance)

    @property
    def _code(self) -> ModuleType:
        return OBJECTIVES.module(self.objective)
