"""The course of a search in stages: all that was tried, and the best of it, which only a sure gain replaces."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from neuroal_jax.allocation.allocation import Allocation
from neuroal_jax.allocation.problem import Candidate, Gain, Model
from neuroal_jax.errors import UserError

Parameters = Mapping[str, float | str | None]


@dataclass(frozen=True)
class Trial:
    """An allocation that was scored.

    Attributes:
        allocation: What was tried.
        parameters: What makes it, by name.
        score: Smaller is better.
        of_sequences: float64 `[sequence]`, of which the score is the mean; None where it is none.
        of_linears: float64 `[block, linear]`, of which the score is the sum; None where it is none.
    """

    allocation: Allocation
    parameters: Parameters
    score: float
    of_sequences: np.ndarray | None = None
    of_linears: np.ndarray | None = None


@dataclass
class Course:
    """A search on its way.

    Attributes:
        model: Scores candidates.
        guard: By how many standard errors a gain must exceed zero for a stage's winner to be kept.
        stages: Every candidate of every stage so far.
        chosen: The parameters of the winners that were kept, by stage.
        gains: Of every stage's winner over the best before it; the first stage's best before is its first candidate.
    """

    model: Model
    guard: float
    stages: dict[str, list[Candidate]] = field(default_factory=dict)
    chosen: dict[str, Parameters] = field(default_factory=dict)
    gains: dict[str, Gain] = field(default_factory=dict)
    _best: Trial | None = None

    @property
    def best(self) -> Trial:
        """The best of everything tried, as far as the guard lets it."""
        if self._best is None:
            raise ValueError("nothing was tried yet")
        return self._best

    def run(self, stage: str, candidates: Sequence[tuple[Parameters, Allocation]]) -> list[Trial]:
        """Scores the candidates of a stage, all in one walk, and keeps the winner if its gain is sure.

        Raises:
            UserError: If a score is not finite.
        """
        scores = self.model.score(stage, [allocation for _, allocation in candidates])
        totals = scores.totals.tolist()
        if not np.all(np.isfinite(totals)):
            raise UserError(f"scores of the stage '{stage}' are not finite: {totals}; try --dtype float32")
        trials = [
            Trial(
                allocation,
                parameters,
                total,
                None if scores.of_sequences is None else scores.of_sequences[number],
                None if scores.of_linears is None else scores.of_linears[number],
            )
            for number, ((parameters, allocation), total) in enumerate(zip(candidates, totals, strict=True))
        ]
        self.stages[stage] = [Candidate(trial.parameters, trial.score) for trial in trials]
        before, winner = self._best or trials[0], min(trials, key=lambda trial: trial.score)  # of equal ones the first
        if winner is before:
            self._best, self.chosen[stage] = before, before.parameters
            return trials
        self.gains[stage] = gain(before, winner, self.guard)
        self._best = before
        if self.gains[stage].kept:
            self._best, self.chosen[stage] = winner, winner.parameters
        return trials


def gain(before: Trial, after: Trial, guard: float) -> Gain:
    """By how much a trial is better than another one, sequence by sequence, and whether to believe it.

    The standard error is that of the mean of the paired differences. There is none where the score is no mean over
    sequences, or there is one sequence only: any gain counts then.
    """
    if before.of_sequences is None or after.of_sequences is None or len(after.of_sequences) < 2:
        mean = before.score - after.score
        return Gain(mean, None, mean > 0)
    differences = before.of_sequences - after.of_sequences
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return Gain(mean, error, mean > 0 and mean > guard * error)
