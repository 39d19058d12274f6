"""DLP (Chen et al., 2025): blocks whose median Wanda score is larger are kept denser."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from neuroal_jax.allocation import ALLOCATIONS
from neuroal_jax.allocation.allocation import Allocation, by_block
from neuroal_jax.allocation.problem import Decision, Problem
from neuroal_jax.allocation.spread import guarded, spread
from neuroal_jax.machine.programs import program
from neuroal_jax.numerics.statistics import Statistics, norms
from neuroal_jax.pruners import wanda


def allocate(problem: Problem) -> Decision:
    """Measures the median score of every block of the dense model over the calibration set."""
    medians = problem.model.measure("medians", ALLOCATIONS["dlp"].needs, block_median, {})
    found = allocation(problem.sparsity, problem.options["dlp_lambda"], medians, problem.linears)
    return Decision(found, measured={"medians": list(medians)})


def allocation(sparsity: float, strength: float, medians: list[float], linears: list[str]) -> Allocation:
    """Densities that span `2 * strength` in proportion to the blocks' median scores.

    Args:
        sparsity: Mean of the result, before the guard.
        strength: Half the span.
        medians: Median Wanda score of each block, in the dense model.
        linears: Names of a block's linears.
    """
    return by_block("dlp", guarded(spread(sparsity, strength, np.array(medians))).tolist(), linears)


def block_median(linears: Mapping[str, Array], statistics: Mapping[str, Statistics]) -> float:
    """The median Wanda score of a block: of `W[out, in]` of its linears, and the statistics of their inputs."""
    squares = [statistics[linear]["squares"] for linear in linears]
    return float(median_score(list(linears.values()), squares))


@program()
def median_score(weights: Sequence[Float[Array, "_ _"]], squares: Sequence[Float[Array, "_ _"]]) -> Float[Array, ""]:
    """The median Wanda score of all linears together; of an even number, the lower one of the two in the middle.

    Found bit by bit on the scores' binary form, which is in their order since none is negative: 32 passes, no sorting.

    Args:
        weights: `[out, in]` of every linear.
        squares: `[sequence, in]` of every linear's input.
    """
    scores = [wanda.scores(weight, norms(sums)) for weight, sums in zip(weights, squares, strict=True)]
    keys = [jax.lax.bitcast_convert_type(jnp.abs(x), jnp.uint32) for x in scores]
    wanted = (sum(x.size for x in scores) + 1) // 2

    def decide(bit: Int[Array, ""], found: UInt[Array, ""]) -> UInt[Array, ""]:
        trial = found | (jnp.uint32(1 << 31) >> bit.astype(jnp.uint32))
        below = sum(jnp.sum(x < trial, dtype=jnp.int32) for x in keys)
        return jnp.where(below < wanted, trial, found)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 32, decide, jnp.uint32(0)), jnp.float32)
