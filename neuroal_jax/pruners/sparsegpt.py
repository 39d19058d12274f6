"""SparseGPT (Frantar and Alistarh, 2023): prune column by column and let the later columns make up for each error."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from neuroal_jax.masks.patterns.columns import ColumnGroups
from neuroal_jax.numerics.cholesky import Factor, factorise
from neuroal_jax.numerics.selection import Quota, select_smallest, zeros_first
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
    weight: Float[Array, "out in"], factor: Factor, quota: Quota, pattern: ColumnGroups, settings: Settings
) -> tuple[Float[Array, "out in"], Bool[Array, "out in"]]:
    """Prunes groups of columns from left to right.

    In each group the lowest saliencies `W^2 / U_jj^2` over all rows go. Then, column by column, the error
    `(w - q) / U_jj` of what went is fed into the later columns, so that the layer's output on the calibration data
    stays as close as it can. Weights of dead columns go first; those that the quota spares keep their value. Weights
    that are zero in the checkpoint go before all others, even where earlier errors have moved them.

    Args:
        weight: The dense weight.
        factor: Of the Hessian of this weight's input.
        quota: One number per group.
        pattern: Columns per group; the last group has what is left.
        settings: None of its own.

    Returns:
        The updated weight in fp32, and its mask (True = kept).
    """
    del settings
    out, width = weight.shape
    group = min(pattern.size, width)
    padding = -width % group
    upper = jax.scipy.linalg.block_diag(factor.upper, jnp.eye(padding, dtype=jnp.float32))
    dead = jnp.pad(factor.dead, (0, padding))
    beyond = jnp.arange(width + padding) >= width
    zeros = jnp.pad(zeros_first(jnp.zeros((out, width)), quota) < 0, ((0, 0), (0, padding)))

    def one_group(number: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, mask = state
        start = number * group
        block = jax.lax.dynamic_slice(weight, (0, start), (out, group))
        rows = jax.lax.dynamic_slice(upper, (start, 0), (group, width + padding))
        square = jax.lax.dynamic_slice(rows, (0, start), (group, group))
        saliency = jnp.square(block) / jnp.square(jnp.diagonal(square))
        saliency = jnp.where(jax.lax.dynamic_slice(dead, (start,), (group,)), 0, saliency)
        saliency = jnp.where(jax.lax.dynamic_slice(beyond, (start,), (group,)), jnp.inf, saliency)
        if quota.zeros is not None:
            saliency = jnp.where(jax.lax.dynamic_slice(zeros, (0, start), (out, group)), -jnp.inf, saliency)
        quota_here = Quota(jnp.asarray(quota.pruned)[number][None], quota.ties)
        pruned = select_smallest(saliency.reshape(1, -1), quota_here).reshape(out, group)
        block, errors = _prune_columns(block, pruned, square)
        later = jnp.arange(width + padding) >= start + group
        weight = weight - jnp.matmul(errors, jnp.where(later, rows, 0), precision=_HIGHEST)
        weight = jax.lax.dynamic_update_slice(weight, block, (0, start))
        return weight, jax.lax.dynamic_update_slice(mask, ~pruned, (0, start))

    padded = jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, padding)))
    start = (padded, jnp.ones(padded.shape, bool))
    updated, mask = jax.lax.fori_loop(0, (width + padding) // group, one_group, start)
    return updated[:, :width], mask[:, :width]


def _prune_columns(
    block: Float[Array, "out group"], pruned: Bool[Array, "out group"], upper: Float[Array, "group group"]
) -> tuple[Float[Array, "out group"], Float[Array, "out group"]]:
    """Prunes a group's columns in order, each error fed into the columns after it; returns the errors too."""

    def one_column(j: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        block, errors = state
        kept = jnp.where(pruned[:, j], 0, block[:, j])
        error = (block[:, j] - kept) / upper[j, j]
        block = block - error[:, None] * upper[j]  # U is zero left of its diagonal: what is done stays
        return block.at[:, j].set(kept), errors.at[:, j].set(error)

    return jax.lax.fori_loop(0, block.shape[1], one_column, (block, jnp.zeros_like(block)))
