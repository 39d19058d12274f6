"""Directions in which a shape moves: waves in depth, and kinds of linears against each other. Imports no JAX."""

import math
from collections.abc import Sequence

import numpy as np

from neuroal_jax.models.family import LinearSpec, Shapes


def depth_direction(wave: int, num_blocks: int) -> np.ndarray:
    """`-cos(pi k (b + 1/2) / L)` of every block b of L, scaled so that the largest is 1; float64 `[block]`.

    k = 1 makes later blocks sparser; all zero where L blocks cannot show k half waves.

    Args:
        wave: k, from 1 on.
        num_blocks: L.
    """
    if wave >= num_blocks:
        return np.zeros(num_blocks)
    values = -np.cos(np.pi * wave * (np.arange(num_blocks) + 0.5) / num_blocks)
    return values / np.abs(values).max()


def kind_directions(linears: Sequence[LinearSpec], shapes: Shapes) -> dict[str, np.ndarray]:
    """Kinds of linears against each other, as far as a family's linears tell them apart; by name, float64 `[linear]`.

    - `queries and keys`: sparser, values and the attention's output denser;
    - `gate`: sparser, what ends the MLP denser;
    - `MLP`: sparser, attention denser, by as many weights in all.

    A linear of parts of different kinds, such as a fused q/k/v, is of neither; a direction of one side alone is left
    out.

    Args:
        linears: Of a block.
        shapes: `(out, in)` of each.
    """
    attention = [linear for linear in linears if not linear.in_mlp]
    mlp = [linear for linear in linears if linear.in_mlp]
    share = _weights(attention, shapes) / max(1, _weights(mlp, shapes))
    sides = {
        "queries and keys": ((_that_select(attention), 1.0), (_that_pass_on(attention), -1.0)),
        "gate": ((_that_select(mlp), 1.0), ([x for x in mlp if all(part.feeds_next_block for part in x.parts)], -1.0)),
        "MLP": ((mlp, share), (attention, -1.0)),
    }
    found = {}
    for name, both in sides.items():
        if all(side for side, _ in both):
            values = {linear.name: value for side, value in both for linear in side}
            found[name] = np.array([values.get(linear.name, 0.0) for linear in linears])
    return found


def _that_select(linears: Sequence[LinearSpec]) -> list[LinearSpec]:
    return [linear for linear in linears if all(part.selects for part in linear.parts)]


def _that_pass_on(linears: Sequence[LinearSpec]) -> list[LinearSpec]:
    return [linear for linear in linears if not any(part.selects for part in linear.parts)]


def _weights(linears: Sequence[LinearSpec], shapes: Shapes) -> int:
    return sum(math.prod(shapes[linear.name]) for linear in linears)


def directions(waves: int, num_blocks: int, linears: Sequence[LinearSpec], shapes: Shapes) -> dict[str, np.ndarray]:
    """All directions of a model by name, depth first; float64 `[block, linear]`.

    Args:
        waves: The most half waves in depth.
        num_blocks: Number of blocks.
        linears: Of a block.
        shapes: `(out, in)` of each.
    """
    depth = {f"depth {wave}": depth_direction(wave, num_blocks) for wave in range(1, waves + 1)}
    found = {name: np.repeat(values[:, None], len(linears), axis=1) for name, values in depth.items() if values.any()}
    kinds = kind_directions(linears, shapes)
    return {**found, **{name: np.repeat(values[None], num_blocks, axis=0) for name, values in kinds.items()}}


def most_directions(waves: int) -> int:
    """How many directions a model has at most."""
    return waves + 3


def quadratic_step(minus: float, centre: float, plus: float, width: float, limit: float) -> float:
    """Where the parabola through the logarithms of three objectives is lowest, at most `limit` away from its centre.

    With f the logarithms, `g = (f+ - f-) / (2 width)` and `h = (f+ + f- - 2 f0) / width^2`: `-g / h`, or the limit
    downhill where `h <= 0`. Whole tenths of the limit, since the last digits of an objective depend on how many
    candidates run together, and an allocation must not.

    Args:
        minus: The objective `width` before the centre.
        centre: The objective there.
        plus: The objective `width` behind it.
        width: The distance.
        limit: The longest step.
    """
    before, here, behind = (math.log(max(value, np.finfo(float).tiny)) for value in (minus, centre, plus))
    slope = (behind - before) / (2 * width)
    curvature = (behind + before - 2 * here) / width**2
    step = -slope / curvature if curvature > 0 else -math.copysign(limit, slope) if slope else 0.0
    return limit * round(10 * min(max(step / limit, -1), 1)) / 10 if limit else 0.0
