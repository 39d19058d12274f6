"""The Cholesky factor of a Hessian's inverse, damped until it is finite."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

DAMPING = (0.01, 0.1, 1.0)  # tried in this order, as shares of the Hessian's mean diagonal


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
