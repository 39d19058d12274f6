"""OWL (Yin et al., 2024): blocks with more outliers among their Wanda scores are kept denser."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neuroal_jax.allocation import ALLOCATIONS
from neuroal_jax.allocation.allocation import Allocation, by_block
from neuroal_jax.allocation.problem import Decision, Problem
from neuroal_jax.allocation.spread import guarded, spread
from neuroal_jax.machine.programs import program
from neuroal_jax.numerics.statistics import Statistics, norms
from neuroal_jax.pruners import wanda


def allocate(problem: Problem) -> Decision:
    """Measures the outliers of every block of the dense model over the calibration set."""
    settings = {"owl_m": problem.options["owl_m"]}
    of_block = partial(percentage, multiple=settings["owl_m"])
    outliers = problem.model.measure("outliers", ALLOCATIONS["owl"].needs, of_block, settings)
    found = allocation(problem.sparsity, problem.options["owl_lambda"], outliers, problem.linears)
    return Decision(found, measured={"outliers": list(outliers)})


def percentage(linears: Mapping[str, Array], statistics: Mapping[str, Statistics], multiple: float) -> float:
    """A block's outliers in percent: of `W[out, in]` of its linears, the statistics of their inputs, and OWL's M."""
    squares = [statistics[linear]["squares"] for linear in linears]
    return 100 * float(outlier_share(list(linears.values()), squares, multiple))


@program()
def outlier_share(
    weights: Sequence[Float[Array, "_ _"]],
    squares: Sequence[Float[Array, "_ _"]],
    multiple: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """The share of a block's Wanda scores, of all linears together, that exceed `multiple` times their mean.

    Args:
        weights: `[out, in]` of every linear.
        squares: `[sequence, in]` of every linear's input.
        multiple: OWL's M.
    """
    scores = [wanda.scores(weight, norms(sums)) for weight, sums in zip(weights, squares, strict=True)]
    total = float(sum(x.size for x in scores))
    mean = jnp.sum(jnp.stack([jnp.sum(x) for x in scores])) / total
    return jnp.sum(jnp.stack([jnp.sum(x > multiple * mean) for x in scores])) / total


def allocation(sparsity: float, strength: float, outliers: list[float], linears: list[str]) -> Allocation:
    """Densities that span `2 * strength` in proportion to the blocks' outlier ratios.

    Args:
        sparsity: Mean of the result, before the guard.
        strength: lambda.
        outliers: Percentage of outliers of each block, in the dense model.
        linears: Names of a block's linears.
    """
    return by_block("owl", guarded(spread(sparsity, strength, np.array(outliers))).tolist(), linears)
