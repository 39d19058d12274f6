"""SparseGPT (Frantar and Alistarh, 2023): prune column by column and let the later columns make up for each error."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from neuroal_jax.numerics.selection import Quota, select_smallest

DAMPING = (0.01, 0.1, 1.0)  # tried in this order, as shares of the Hessian's mean diagonal
_HIGHEST = jax.lax.Precision.HIGHEST


class Factor(NamedTuple):
    """What the linears that share an input need of its Hessian.

    Attributes:
        upper: U, the upper Cholesky factor of the damped Hessian's inverse: `inverse = U^T U`.
        dead: Columns whose input is always zero.
        level: Index into `DAMPING` of what it took; `len(DAMPING)` where nothing helped and U is not finite.
    """

    upper: Float[Array, "in in"]
    dead: Bool[Array, "in"]
    level: Int[Array, ""]


@jax.custom_batching.sequential_vmap  # batched, LAPACK's calls in jaxlib wait for each other for ever on few cores
def factorise(hessian: Float[Array, "in in"]) -> Factor:
    """Damps a Hessian until its inverse has a finite factor.

    A failed Cholesky factorisation raises nothing in JAX, it gives NaN: hence the finite check. U is the inverse of V
    with `H = V V^T`, V upper, and V is the ordinary factor of H with rows and columns in reverse order: more accurate
    in fp32 than to invert H and factorise the inverse.
    """
    width = hessian.shape[0]
    dead = jnp.diagonal(hessian) == 0
    alive = hessian + jnp.diag(dead.astype(jnp.float32))
    unit = jnp.mean(jnp.diagonal(alive))
    eye = jnp.eye(width, dtype=jnp.float32)

    def attempt(state: tuple[Array, Array]) -> tuple[Array, Array]:
        level = state[0] + 1
        damped = alive + jnp.asarray(DAMPING, jnp.float32)[level] * unit * eye
        lower = jax.lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)
        upper = jax.lax.linalg.triangular_solve(lower[::-1, ::-1], eye, left_side=True, lower=False)
        return level, jnp.triu(upper)

    def failed(state: tuple[Array, Array]) -> Bool[Array, ""]:
        level, upper = state
        return ~jnp.all(jnp.isfinite(upper)) & (level < len(DAMPING) - 1)

    level, upper = jax.lax.while_loop(failed, attempt, (jnp.int32(-1), jnp.full_like(hessian, jnp.nan)))
    return Factor(upper, dead, jnp.where(jnp.all(jnp.isfinite(upper)), level, len(DAMPING)))


def prune(
    weight: Float[Array, "out in"], factor: Factor, quota: Quota, group: int
) -> tuple[Float[Array, "out in"], Bool[Array, "out in"]]:
    """Prunes groups of columns from left to right.

    In each group the lowest saliencies `W^2 / U_jj^2` over all rows go. Then, column by column, the error
    `(w - q) / U_jj` of what went is fed into the later columns, so that the layer's output on the calibration data
    stays as close as it can. Weights of dead columns go first; those that the quota spares keep their value.

    Args:
        weight: The dense weight.
        factor: Of the Hessian of this weight's input.
        quota: One number per group.
        group: Columns per group; the last group has what is left.

    Returns:
        The updated weight in fp32, and its mask (True = kept).
    """
    out, width = weight.shape
    group = min(group, width)
    padding = -width % group
    upper = jax.scipy.linalg.block_diag(factor.upper, jnp.eye(padding, dtype=jnp.float32))
    dead = jnp.pad(factor.dead, (0, padding))
    beyond = jnp.arange(width + padding) >= width

    def one_group(number: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, mask = state
        start = number * group
        block = jax.lax.dynamic_slice(weight, (0, start), (out, group))
        rows = jax.lax.dynamic_slice(upper, (start, 0), (group, width + padding))
        square = jax.lax.dynamic_slice(rows, (0, start), (group, group))
        saliency = jnp.square(block) / jnp.square(jnp.diagonal(square))
        saliency = jnp.where(jax.lax.dynamic_slice(dead, (start,), (group,)), 0, saliency)
        saliency = jnp.where(jax.lax.dynamic_slice(beyond, (start,), (group,)), jnp.inf, saliency)
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
