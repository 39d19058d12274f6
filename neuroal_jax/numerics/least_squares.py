"""Least squares on a fixed mask: the kept weights that come closest to the dense model's output. Always fp32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST


class Products(NamedTuple):
    """Sums of an input's products over tokens: X the input as it is now, X_d as it is in the dense block.

    Attributes:
        gram: `X^T X`.
        cross: `X^T X_d`; None where both inputs are one.
        dense: `X_d^T X_d`; None likewise.
    """

    gram: Float[Array, "in in"]
    cross: Float[Array, "in in"] | None
    dense: Float[Array, "in in"] | None


def no_products(width: int, *, same: bool) -> Products:
    """The products of no tokens; `same`: whether X and X_d are one."""
    zeros = (jnp.zeros((width, width), jnp.float32) for _ in range(3))
    return Products(next(zeros), None, None) if same else Products(*zeros)


def add_products(
    before: Products, x: Float[Array, "sequence token in"], dense: Float[Array, "sequence token in"], counted: Array
) -> Products:
    """Takes in a batch of sequences.

    Args:
        before: The products so far.
        x: The input as it is now.
        dense: The input in the dense block.
        counted: `[sequence]`, whether each counts.
    """

    def tokens(of_batch: Array) -> Float[Array, "tokens in"]:
        kept = jnp.where(counted[:, None, None], of_batch.astype(jnp.float32), 0)
        return kept.reshape(-1, kept.shape[-1])

    def product(a: Array, b: Array) -> Float[Array, "in in"]:
        return jnp.matmul(a.T, b, precision=_HIGHEST)

    now = tokens(x)
    gram = before.gram + product(now, now)
    if before.cross is None or before.dense is None:
        return Products(gram, None, None)
    then = tokens(dense)
    return Products(gram, before.cross + product(now, then), before.dense + product(then, then))


class Solution(NamedTuple):
    """The weights of a fixed mask and how far their outputs are from the dense ones, by output.

    Attributes:
        weight: Zero where the mask is False.
        before: `||X start_i - X_d w_i||^2`.
        after: The same of the solution.
        dense: `||X_d w_i||^2`.
        iterations: How many it took.
    """

    weight: Float[Array, "out in"]
    before: Float[Array, "out"]
    after: Float[Array, "out"]
    dense: Float[Array, "out"]
    iterations: Int[Array, ""]


class _State(NamedTuple):
    """Conjugate gradients of all rows: the weights, what the equations lack, the directions, `residual . scaled`."""

    iteration: Int[Array, ""]
    weight: Float[Array, "out in"]
    residual: Float[Array, "out in"]
    direction: Float[Array, "out in"]
    size: Float[Array, "out"]


def solve(
    weight: Float[Array, "out in"],
    start: Float[Array, "out in"],
    mask: Bool[Array, "out in"],
    products: Products,
    *,
    damping: float,
    iterations: int,
    tolerance: float,
) -> Solution:
    """Minimises `||X W'^T - X_d W^T||^2 + lambda ||W' - W||^2` over the weights W' that a mask keeps.

    Each row is a problem of its own, `(X^T X + lambda)_mm w'_m = (X^T X_d w + lambda w)_m` with m what it keeps.
    Conjugate gradients solve all rows at once, with the diagonal as the preconditioner: one product with `X^T X` an
    iteration. Each iteration makes every row's objective smaller. Rows that keep nothing, and weights of columns whose
    input is always zero, stay as they are at the start.

    Args:
        weight: W, the dense weights.
        start: Where W' begins; what the mask prunes of it counts as zero.
        mask: True = kept.
        products: Of the input.
        damping: lambda, as a share of the mean of X^T X's diagonal.
        iterations: At most so many.
        tolerance: It ends where what the equations lack is down to this share of what it was, in the norm that the
            preconditioner gives, over all rows.
    """
    gram = products.gram
    cross = gram if products.cross is None else products.cross
    dense = gram if products.dense is None else products.dense
    weight = weight.astype(jnp.float32)
    diagonal = jnp.diagonal(gram)
    strength = damping * jnp.mean(diagonal)
    scale = diagonal + strength
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)

    def times(v: Float[Array, "out in"], matrix: Float[Array, "in in"]) -> Float[Array, "out in"]:
        return jnp.matmul(v, matrix, precision=_HIGHEST)

    def of_equations(v: Float[Array, "out in"]) -> Float[Array, "out in"]:
        return jnp.where(mask, times(v, gram) + strength * v, 0)

    def inner(a: Float[Array, "out in"], b: Float[Array, "out in"]) -> Float[Array, "out"]:
        return jnp.sum(a * b, axis=1)

    def ratio(a: Float[Array, "out"], b: Float[Array, "out"]) -> Float[Array, "out"]:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)  # 0/0 where a row is solved

    aim = jnp.where(mask, times(weight, cross.T), 0)
    right = aim + jnp.where(mask, strength * weight, 0)
    target = inner(weight, times(weight, dense))

    def errors(v: Float[Array, "out in"], residual: Float[Array, "out in"]) -> Float[Array, "out"]:
        of_v = right - residual - strength * v  # v X^T X, of what is kept
        return jnp.maximum(inner(v, of_v) - 2 * inner(v, aim) + target, 0)

    begin = jnp.where(mask, start.astype(jnp.float32), 0)
    residual = right - of_equations(begin)
    scaled = residual * inverse
    first = inner(residual, scaled)

    def goes_on(state: _State) -> Bool[Array, ""]:
        return (state.iteration < iterations) & (jnp.sum(state.size) > tolerance**2 * jnp.sum(first))

    def step(state: _State) -> _State:
        product = of_equations(state.direction)
        length = ratio(state.size, inner(state.direction, product))[:, None]
        residual = state.residual - length * product
        scaled = residual * inverse
        size = inner(residual, scaled)
        direction = scaled + ratio(size, state.size)[:, None] * state.direction
        return _State(state.iteration + 1, state.weight + length * state.direction, residual, direction, size)

    found = jax.lax.while_loop(goes_on, step, _State(jnp.int32(0), begin, residual, scaled, first))
    before, after = errors(begin, residual), errors(found.weight, found.residual)
    return Solution(found.weight, before, after, target, found.iteration)
