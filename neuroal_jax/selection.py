"""Choosing the k smallest scores of every row, exactly, without sorting.

The k-th smallest score of a row is found bit by bit on the scores' binary form (a radix select): 32 counting passes,
whatever the row's length. The result equals a stable sort's, ties going to the lower index, infinities included.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt


def select_smallest(
    scores: Float[Array, "out in"], counts: Int[Array, "out"], ties_high: Bool[Array, ""] | bool = False
) -> Bool[Array, "out in"]:
    """Marks the `counts[i]` smallest scores of each row i.

    Args:
        scores: fp32 scores without NaN; `-0.0` equals `0.0`.
        counts: How many to mark, from 0 to the row's length.
        ties_high: Among equal scores, mark the highest indices first instead of the lowest: what is left unmarked is
            then what a stable descending sort puts first.
    """
    keys = _ordered_bits(scores)
    threshold = _kth_smallest(keys, counts)[:, None]
    below = keys < threshold
    equal = keys == threshold
    rank = jnp.cumsum(equal, axis=1, dtype=jnp.int32)  # 1 for the first of the equal ones
    wanted = (counts - jnp.sum(below, axis=1, dtype=jnp.int32))[:, None]
    first = jnp.where(ties_high, rank[:, -1:] - wanted, 0)
    return below | (equal & (rank > first) & (rank <= first + wanted))


def _ordered_bits(scores: Float[Array, "out in"]) -> UInt[Array, "out in"]:
    """Unsigned integers in the order of the floats they stand for."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    sign = jnp.uint32(0x80000000)
    bits = jnp.where(bits == sign, 0, bits)  # -0.0
    return jnp.where(bits & sign, ~bits, bits | sign)


def _kth_smallest(keys: UInt[Array, "out in"], counts: Int[Array, "out"]) -> UInt[Array, "out"]:
    """The largest t of each row with fewer than `counts` keys below it."""

    def decide(step: Int[Array, ""], found: UInt[Array, "out"]) -> UInt[Array, "out"]:
        trial = found | (jnp.uint32(0x80000000) >> step.astype(jnp.uint32))
        below = jnp.sum(keys < trial[:, None], axis=1, dtype=jnp.int32)
        return jnp.where(below < counts, trial, found)

    return jax.lax.fori_loop(0, 32, decide, jnp.zeros(keys.shape[0], jnp.uint32))
