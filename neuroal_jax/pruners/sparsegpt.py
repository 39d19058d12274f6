"""SparseGPT (Frantar and Alistarh, 2023): prune column by column and let the later columns make up for each error."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from neuroal_jax.masks.patterns import Pattern
from neuroal_jax.numerics.cholesky import Factor, factorise
from neuroal_jax.numerics.selection import Quota, zeros_first
from neuroal_jax.numerics.statistics import Statistics
from neuroal_jax.registry import Settings

COMPILER_BYTES = 110 * 2**20  # to compile and to hold its programs

_HIGHEST = jax.lax.Precision.HIGHEST


def prepare(statistics: Statistics) -> Factor:
    """The factor that the linears of one input share."""
    return factorise(statistics["hessian"])


def damping(factor: Factor) -> Int[Array, ""]:
    """Index into `numerics.cholesky.DAMPING` of what the Hessian took."""
    return factor.level


def reference_weights(sequences: int) -> Float[Array, "sequence"]:
    """By what sequence i counts in the alignment of the released code's SparseGPT search: 2/i."""
    return 2 / jnp.arange(1, sequences + 1)


def memory(shapes: Mapping[str, tuple[int, int]], widths: Mapping[str, int]) -> int:
    """Bytes while one block is pruned, all fp32.

    Every input's Hessian and its factor, twice the widest to factorise it, and the widest linear three times.

    Args:
        shapes: `(out, in)` of each linear.
        widths: Of each input.
    """
    squares = [width**2 for width in widths.values()]
    return 4 * (2 * sum(squares) + 2 * max(squares) + 3 * max(math.prod(shape) for shape in shapes.values()))


def prune(
    weight: Float[Array, "out in"], factor: Factor, quota: Quota, pattern: Pattern, settings: Settings
) -> tuple[Float[Array, "out in"], Bool[Array, "out in"]]:
    """Prunes columns from left to right, those together of which the pattern decides together.

    Of these the lowest saliencies `W^2 / U_jj^2` go: over all rows, or of each row where it keeps N of M. Then, column
    by column, the error `(w - q) / U_jj` of what went is fed into the later columns, so that the layer's output on the
    calibration data stays as close as it can. Weights of dead columns go first; those that the quota spares keep their
    value. Weights that are zero in the checkpoint go before all others, even where earlier errors have moved them.

    Args:
        weight: The dense weight.
        factor: Of the Hessian of this weight's input.
        quota: As the pattern splits it.
        pattern: Which weights compete.
        settings: Columns per group: errors reach the columns beyond a group once it is done.

    Returns:
        The updated weight in fp32, and its mask (True = kept).
    """
    out, width = weight.shape
    together = pattern.together(width)
    group = max(1, min(settings["sparsegpt_group"], width) // together) * together
    padding = -width % group
    upper = jax.scipy.linalg.block_diag(factor.upper, jnp.eye(padding, dtype=jnp.float32))
    dead = jnp.pad(factor.dead, (0, padding))
    beyond = jnp.arange(width + padding) >= width
    zeros = jnp.pad(zeros_first(jnp.zeros((out, width)), quota) < 0, ((0, 0), (0, padding)))

    def saliency(columns: Float[Array, "out some"], diagonal: Float[Array, "some"], start: Int[Array, ""]) -> Array:
        def here(of_columns: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(of_columns, start, columns.shape[1], axis=-1)

        found = jnp.square(columns) / jnp.square(diagonal)
        found = jnp.where(here(dead), 0, found)
        found = jnp.where(here(beyond), jnp.inf, found)
        return found if quota.zeros is None else jnp.where(here(zeros), -jnp.inf, found)

    def one_group(number: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, mask = state
        start = number * group
        rows = jax.lax.dynamic_slice(upper, (start, 0), (group, width + padding))
        square = jax.lax.dynamic_slice(rows, (0, start), (group, group))
        diagonal = jnp.diagonal(square)

        def decide(part: Int[Array, ""] | int, state: _Group) -> _Group:
            first = part * together
            columns = jax.lax.dynamic_slice_in_dim(state.weight, first, together, axis=1)
            of_columns = saliency(columns, jax.lax.dynamic_slice_in_dim(diagonal, first, together), start + first)
            chosen = pattern.select_columns(of_columns, quota, number * (group // together) + part)
            pruned = jax.lax.dynamic_update_slice_in_dim(state.pruned, chosen, first, axis=1)
            return _prune_columns(state._replace(pruned=pruned), square, first, together)

        block = jax.lax.dynamic_slice(weight, (0, start), (out, group))
        done = _Group(block, jnp.zeros(block.shape, bool), jnp.zeros_like(block))
        done = decide(0, done) if group == together else jax.lax.fori_loop(0, group // together, decide, done)
        later = jnp.arange(width + padding) >= start + group
        weight = weight - jnp.matmul(done.errors, jnp.where(later, rows, 0), precision=_HIGHEST)
        weight = jax.lax.dynamic_update_slice(weight, done.weight, (0, start))
        return weight, jax.lax.dynamic_update_slice(mask, ~done.pruned, (0, start))

    padded = jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, padding)))
    start = (padded, jnp.ones(padded.shape, bool))
    updated, mask = jax.lax.fori_loop(0, (width + padding) // group, one_group, start)
    return updated[:, :width], mask[:, :width]


class _Group(NamedTuple):
    """Columns in the middle of being pruned: their weights, which of these go, and the errors of what went."""

    weight: Float[Array, "out group"]
    pruned: Bool[Array, "out group"]
    errors: Float[Array, "out group"]


def _prune_columns(
    state: _Group, upper: Float[Array, "group group"], first: Int[Array, ""] | int, count: int
) -> _Group:
    """Prunes `count` columns of a group in order, each error fed into the columns after it."""

    def one_column(place: Int[Array, ""], state: _Group) -> _Group:
        j = first + place
        kept = jnp.where(state.pruned[:, j], 0, state.weight[:, j])
        error = (state.weight[:, j] - kept) / upper[j, j]
        weight = state.weight - error[:, None] * upper[j]  # U is zero left of its diagonal: what is done stays
        return state._replace(weight=weight.at[:, j].set(kept), errors=state.errors.at[:, j].set(error))

    return jax.lax.fori_loop(0, count, one_column, state)
