"""NeuroAL's candidates: the paper's lambdas, and the released code's. Imports nothing."""

from dataclasses import dataclass

PAPER = (0.01, 0.02, 0.03, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.20, 0.25)
REFERENCE = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.20, 0.25)


@dataclass(frozen=True)
class Lambdas:
    """The candidates of each step, in order; empty where the step is not searched."""

    block: tuple[float, ...]
    row: tuple[float, ...]

    @property
    def steps(self) -> list[int]:
        """Number of candidates of each step that is searched."""
        return [len(step) for step in (self.block, self.row) if step]


def block_lambdas(name: str, sparsity: float) -> tuple[float, ...]:
    """The paper's set, or the released code's (`reference`), which leaves 0.25 out from 80% sparsity on."""
    if name == "paper":
        return PAPER
    return REFERENCE[:-1] if sparsity >= 0.8 else REFERENCE


def row_lambdas(name: str) -> tuple[float, ...]:
    """0.0 (every row as its block), then the block step's set, whole."""
    return (0.0, *(PAPER if name == "paper" else REFERENCE))


def lambdas_for(step: str, block: str | tuple[float, ...], row: str | tuple[float, ...], sparsity: float) -> Lambdas:
    """Resolves the names of lambda sets for the steps that are searched."""
    block_set = block_lambdas(block, sparsity) if isinstance(block, str) else block
    row_set = row_lambdas(row) if isinstance(row, str) else row
    return Lambdas(() if step == "row" else block_set, () if step == "block" else row_set)
