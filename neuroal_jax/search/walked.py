"""The model that an allocation asks: measurements and scores by walking its blocks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuroal_jax.allocation.allocation import Allocation
from neuroal_jax.allocation.problem import Differences, Measurement, Norms, Scores
from neuroal_jax.masks.budget import Budget
from neuroal_jax.search.objective import OBJECTIVES
from neuroal_jax.walk import measure, search
from neuroal_jax.walk.blocks import Advance, Blocks
from neuroal_jax.walk.method import Method
from neuroal_jax.walk.programs import Objective

Progress = Callable[[str, int, str], AbstractContextManager[Advance]]  # of a title, a total and its unit


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
        progress: Shows how far a walk is.
    """

    blocks: Blocks
    method: Method
    budget: Budget
    objective: str
    calibration: np.ndarray
    search_set: np.ndarray
    candidate_batch: int
    progress: Progress

    def measure(
        self, label: str, needs: Sequence[str], of_block: Measurement, settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """See `allocation.problem.Model`."""
        with self.progress(label, self.budget.num_blocks, "block") as advance:
            return measure.measure(self.blocks, label, self.calibration, needs, of_block, advance, settings)

    def score(self, stage: str, candidates: Sequence[Allocation]) -> Scores:
        """See `allocation.problem.Model`."""
        counts = [self.budget.counts(candidate) for candidate in candidates]
        with self.progress(stage, self.budget.num_blocks * len(counts), "candidate-block") as advance:
            found = search.score(
                self.blocks, self.method, self._score, self.search_set, counts, self.candidate_batch, advance
            )
        return Scores(of_linears=found)

    def align(self, candidate: Allocation) -> tuple[Scores | None, Differences]:
        """See `allocation.problem.Model`."""
        with self.progress("alignment", self.budget.num_blocks, "block") as advance:
            counts = self.budget.counts(candidate)
            found, differences = search.align(self.blocks, self.method, self._score, self.search_set, counts, advance)
        return Scores(of_linears=found[None]), differences

    def dense_norms(self, candidate: Allocation) -> Norms:
        """See `allocation.problem.Model`."""
        with self.progress("norms", self.budget.num_blocks, "block") as advance:
            return search.dense_norms(self.blocks, self.method, self.search_set, self.budget.counts(candidate), advance)

    @property
    def _score(self) -> Objective:
        score: Objective = OBJECTIVES.module(self.objective).score
        return score
