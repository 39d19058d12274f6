"""Least squares on a fixed mask: the kept weights that come closest to the dense model's output. Always fp32."""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST
_PARTS = 4  # of a product's sides: then 10 of 16 parts are computed


class OfInputs(NamedTuple):
    """Sums of two inputs' products over tokens: X as it is now, X_d as it is in the dense block.

    Attributes:
        cross: `X^T X_d`.
        dense: `X_d^T X_d`.
    """

    cross: Float[Array, "in in"]
    dense: Float[Array, "in in"]


class OfOutputs(NamedTuple):
    """What least squares take of X_d, by way of the dense block's outputs: less to add up where these are fewer.

    Attributes:
        aim: `W X_d^T X`.
        target: `||X_d w_i||^2`.
    """

    aim: Float[Array, "out in"]
    target: Float[Array, "out"]


class Products(NamedTuple):
    """Sums over tokens that least squares take: of the input X as it is now, and of X_d, as it is in the dense block.

    Attributes:
        gram: `X^T X`.
        dense: Of X_d; None where both inputs are one.
    """

    gram: Float[Array, "in in"]
    dense: OfInputs | OfOutputs | None


def no_products(width: int, outputs: int, *, same: bool) -> Products:
    """The products of no tokens.

    Args:
        width: Of the input.
        outputs: Of all linears that read it.
        same: Whether X and X_d are one.
    """

    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, jnp.float32)

    if same:
        return Products(zeros(width, width), None)
    if outputs < width:
        return Products(zeros(width, width), OfOutputs(zeros(outputs, width), zeros(outputs)))
    return Products(zeros(width, width), OfInputs(zeros(width, width), zeros(width, width)))


def add_products(
    before: Products,
    x: Float[Array, "sequence token in"],
    dense: Float[Array, "sequence token in"],
    weight: Float[Array, "out in"],
    counted: Array,
) -> Products:
    """Takes in a batch of sequences.

    Args:
        before: The products so far.
        x: The input as it is now.
        dense: The input in the dense block.
        weight: W, the dense weights of all linears that read it.
        counted: `[sequence]`, whether each counts.
    """

    def tokens(of_batch: Array) -> Float[Array, "tokens in"]:
        kept = jnp.where(counted[:, None, None], of_batch.astype(jnp.float32), 0)
        return kept.reshape(-1, kept.shape[-1])

    def product(a: Array, b: Array) -> Array:
        return jnp.matmul(a.T, b, precision=_HIGHEST)

    now, so_far = tokens(x), before.dense
    gram = before.gram + _gram(now)
    if so_far is None:
        return Products(gram, None)
    then = tokens(dense)
    if isinstance(so_far, OfInputs):
        return Products(gram, OfInputs(so_far.cross + product(now, then), so_far.dense + _gram(then)))
    outputs = jnp.matmul(then, weight.astype(jnp.float32).T, precision=_HIGHEST)
    target = so_far.target + jnp.sum(jnp.square(outputs), axis=0)
    return Products(gram, OfOutputs(so_far.aim + product(outputs, now), target))


def _gram(x: Float[Array, "tokens in"]) -> Float[Array, "in in"]:
    """`X^T X`: what is on one side of the diagonal is on the other, so most of that is not computed again."""
    ends = np.linspace(0, x.shape[1], _PARTS + 1).astype(int)
    parts = [x[:, first:end] for first, end in pairwise(ends)]
    upper = {(a, b): jnp.matmul(parts[a].T, parts[b], precision=_HIGHEST) for b in range(_PARTS) for a in range(b + 1)}
    return jnp.block([[upper[a, b] if a <= b else upper[b, a].T for b in range(_PARTS)] for a in range(_PARTS)])


def _of_outputs(weight: Float[Array, "out in"], products: Products) -> OfOutputs:
    if isinstance(products.dense, OfOutputs):
        return products.dense
    gram = products.gram
    cross, dense = (gram, gram) if products.dense is None else products.dense
    target = jnp.sum(weight * jnp.matmul(weight, dense, precision=_HIGHEST), axis=1)
    return OfOutputs(jnp.matmul(weight, cross.T, precision=_HIGHEST), target)


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
    weight = weight.astype(jnp.float32)
    diagonal = jnp.diagonal(gram)
    strength = damping * jnp.mean(diagonal)
    scale = diagonal + strength
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)

    def of_equations(v: Float[Array, "out in"]) -> Float[Array, "out in"]:
        return jnp.where(mask, jnp.matmul(v, gram, precision=_HIGHEST) + strength * v, 0)

    def inner(a: Float[Array, "out in"], b: Float[Array, "out in"]) -> Float[Array, "out"]:
        return jnp.sum(a * b, axis=1)

    def ratio(a: Float[Array, "out"], b: Float[Array, "out"]) -> Float[Array, "out"]:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)  # 0/0 where a row is solved

    aim, target = _of_outputs(weight, products)
    aim = jnp.where(mask, aim, 0)
    right = aim + jnp.where(mask, strength * weight, 0)

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
