"""What an allocation is asked, what it may ask of the model, and what it answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array

from neuroal_jax.allocation.allocation import Allocation
from neuroal_jax.models.family import Family, Shapes
from neuroal_jax.numerics.statistics import Statistics

Differences = list[dict[str, np.ndarray]]  # per block: D - S of every input, fp32 [in]
Norms = list[dict[str, np.ndarray]]  # per block: the norms D of every input in the dense block, fp32 [in]
Measurement = Callable[[Mapping[str, Array], Mapping[str, Statistics]], Any]  # of a block's W[out, in] and its inputs


@dataclass(frozen=True)
class Scores:
    """What an objective says of candidates; smaller is better. One of the two is None.

    Attributes:
        of_linears: float64 `[candidate, block, linear]`, for an objective that is a sum over linears.
        of_sequences: float64 `[candidate, sequence]`, for one that is a mean over the search set's sequences.
    """

    of_linears: np.ndarray | None = None
    of_sequences: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The one that is there, by its name: `Scores(**scores.arrays)` are the same."""
        return {name: array for name, array in vars(self).items() if array is not None}

    @property
    def totals(self) -> np.ndarray:
        """The score of each candidate, float64 `[candidate]`."""
        if self.of_linears is not None:
            totals: np.ndarray = self.of_linears.sum(axis=2).sum(axis=1)
            return totals
        if self.of_sequences is not None:
            return np.asarray(self.of_sequences.mean(axis=1))
        raise ValueError("scores are of linears or of sequences, these are of neither")


@runtime_checkable
class Model(Protocol):
    """What the models that are asked about can do."""

    def measure(
        self, label: str, needs: Sequence[str], of_block: Measurement, settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """What `of_block(linears, statistics)` gives for every block of the dense model.

        Args:
            label: Of the measurement, lower case and dashes.
            needs: Statistics of every input over the calibration set; without any, no activations are computed.
            of_block: Given a block's linears `W[out, in]` by name and the statistics of its inputs by name; gives a
                number, an array or a dict of arrays.
            settings: All that `of_block` depends on beside what it is given, by name (`{}`: nothing). What another run
                of the same model measured under this label is then taken from it; by default every run measures.
        """

    def score(self, stage: str, candidates: Sequence[Allocation]) -> Scores:
        """What the objective says of each candidate over the search set; `stage` is its name for people."""

    def align(self, candidate: Allocation) -> tuple[Scores | None, Differences]:
        """The `D - S` of every input in every block under one candidate.

        With them come the candidate's scores where the objective compares the inputs of linears; else None.
        """

    def dense_norms(self, candidate: Allocation) -> Norms:
        """The norms of every input in every dense block, behind blocks that are pruned as a candidate says."""


@dataclass(frozen=True)
class Problem:
    """What an allocation decides about.

    Attributes:
        sparsity: Share of all prunable weights to remove.
        num_blocks: Number of blocks.
        shapes: `(out, in)` of each linear of a block, in the family's order.
        family: The model's family, whose `linears` say what feeds what.
        config: The model's config.
        options: All options of the run by name.
        model: For measurements and scores.
    """

    sparsity: float
    num_blocks: int
    shapes: Shapes
    family: Family
    config: Any
    options: Mapping[str, Any]
    model: Model

    @property
    def linears(self) -> list[str]:
        """Names of a block's linears."""
        return list(self.shapes)

    @property
    def reference(self) -> bool:
        """Whether to repeat what the released code does."""
        return bool(self.options["budget"] == "reference")


@dataclass(frozen=True)
class Candidate:
    """One candidate of a stage of a search: its parameters by name (None: it has none of its own), and its score."""

    parameters: Mapping[str, float | str | None]
    score: float


@dataclass(frozen=True)
class Gain:
    """By how much a stage's winner scores better than the best before it.

    Attributes:
        mean: Difference of the scores; negative where the winner is worse.
        error: Standard error of the mean of the differences by sequence; None where the score is no mean of such.
        kept: Whether the winner took the other's place.
    """

    mean: float
    error: float | None
    kept: bool


@dataclass(frozen=True)
class Decision:
    """An allocation and how it was found.

    Attributes:
        allocation: The winner.
        stages: Every candidate of every stage, in order.
        chosen: The winner's parameters of each stage that was searched and gave one that was kept.
        objective: Per block, what each linear adds to the winner's score; None without a search, and where the score is
            no sum over linears.
        measured: What was measured of every block, by name; None where there is no number.
        gains: Of the stages whose winner had to be better than the best before it.
    """

    allocation: Allocation
    stages: Mapping[str, list[Candidate]] = field(default_factory=dict)
    chosen: Mapping[str, Mapping[str, float | str | None]] = field(default_factory=dict)
    objective: list[dict[str, float]] | None = None
    measured: Mapping[str, list[float | None]] = field(default_factory=dict)
    gains: Mapping[str, Gain] = field(default_factory=dict)
