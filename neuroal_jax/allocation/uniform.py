"""The same sparsity everywhere."""

from neuroal_jax.allocation.allocation import Allocation, by_block
from neuroal_jax.allocation.problem import Decision, Problem


def allocation(sparsity: float, linears: list[str], num_blocks: int) -> Allocation:
    """The same sparsity everywhere."""
    return by_block("uniform", [sparsity] * num_blocks, linears)


def allocate(problem: Problem) -> Decision:
    """Measures nothing."""
    return Decision(allocation(problem.sparsity, problem.linears, problem.num_blocks))
