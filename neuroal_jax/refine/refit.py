"""Refits the kept weights of each linear by least squares, so that its output is the dense block's again."""

import math
from collections import Counter
from collections.abc import Sequence

from jaxtyping import Array, Bool, Float

from neuroal_jax.models.family import LinearSpec, Shapes
from neuroal_jax.numerics.least_squares import Products, Solution, solve
from neuroal_jax.registry import Settings

COMPILER_BYTES = 150 * 2**20

_TOLERANCE = 1e-3  # of what the equations lack: less is not seen in a model's output


def memory(linears: Sequence[LinearSpec], shapes: Shapes) -> int:
    """Bytes while the linears of one input are refitted: products, and ten times their weights; the most of all.

    Args:
        linears: Of a block.
        shapes: `(out, in)` of each.
    """
    weights: Counter[str] = Counter()
    for linear in linears:
        weights[linear.reads] += math.prod(shapes[linear.name])
    widths = {linear.reads: shapes[linear.name][1] for linear in linears}
    products = {name: width**2 + min(2 * width**2, weights[name]) for name, width in widths.items()}
    return 4 * max(products[name] + 10 * weights[name] for name in widths)


def update(
    weight: Float[Array, "out in"],
    start: Float[Array, "out in"],
    mask: Bool[Array, "out in"],
    products: Products,
    settings: Settings,
) -> Solution:
    """The kept weights that minimise `||X W'^T - X_d W^T||^2 + lambda ||W' - W||^2`, see `numerics.least_squares`.

    Args:
        weight: The dense weights, of all linears that read an input, one below the other.
        start: The pruned ones.
        mask: True = kept.
        products: Of the input, in the block as it is pruned and refitted so far, and in the dense block.
        settings: Damping: lambda as a share of the mean of X^T X's diagonal; iterations: at most so many.
    """
    damping, iterations = settings["refit_damping"], settings["refit_iterations"]
    return solve(weight, start, mask, products, damping=damping, iterations=iterations, tolerance=_TOLERANCE)
