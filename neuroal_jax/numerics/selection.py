"""Choosing the k smallest scores of every row, exactly, without sorting.

The k-th smallest score of a row is found bit by bit on the scores' binary form (a radix select): 32 counting passes,
whatever the row's length. The result equals a stable sort's, ties going to the lower index, infinities included.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt, UInt8, UInt16

TIES_LOW, TIES_HIGH, TIES_ALL = 0, 1, 2

# Rows of this many bytes at a time: on a CPU 32 passes over them stay in the cache, an accelerator wants width.
_CHUNK_BYTES = {"cpu": 2 * 2**20}
_CHUNK_BYTES_ELSEWHERE = 2**30
_PIECES, _LANES = {"cpu": 32}, 16  # of a row, in counting, and the least that one holds; see `_count_below`


class Quota(NamedTuple):
    """How many weights of each set of competitors go, and which of equal scores go first.

    Attributes:
        pruned: Numbers: one per row, or one per group of columns where a pruner chooses over all rows.
        ties: `TIES_LOW`: the lowest index; `TIES_HIGH`: the highest, so that what stays is what a stable descending
            sort puts first; `TIES_ALL`: all that equal the last one chosen, beyond the number.
        zeros: Which weights of the linear are zero in the checkpoint, packed along the input axis: these go before all
            others, whatever their scores. None where the model has no zeros, or they count as any other weight.
    """

    pruned: Int[Array, "*candidate sets"] | np.ndarray
    ties: Int[Array, "*candidate"] | int = TIES_LOW
    zeros: UInt8[Array, "*candidate out bytes"] | np.ndarray | None = None


Quotas = dict[str, Quota]  # of a block, by linear
Counts = list[Quotas]  # of a model, by block


def zeros_first(scores: Float[Array, "out in"], quota: Quota) -> Float[Array, "out in"]:
    """Scores with those of the quota's zeros below all others."""
    if quota.zeros is None:
        return scores
    return jnp.where(jnp.unpackbits(quota.zeros, axis=1, count=scores.shape[1]) > 0, -jnp.inf, scores)


def select_smallest(scores: Float[Array, "out in"], quota: Quota) -> Bool[Array, "out in"]:
    """Marks the `quota.pruned[i]` smallest scores of each row i.

    Args:
        scores: fp32 scores without NaN; `-0.0` equals `0.0`.
        quota: How many to mark, from 0 to the row's length, and what to do about equal scores.
    """
    counts = jnp.asarray(quota.pruned)
    return _select(scores, counts, jnp.broadcast_to(quota.ties, counts.shape))


@jax.custom_batching.custom_vmap
def _select(
    scores: Float[Array, "row in"], counts: Int[Array, "row"], ties: Int[Array, "row"]
) -> Bool[Array, "row in"]:
    """`select_smallest` with one rule for ties per row; batches become more rows."""
    rows = scores.shape[0]
    limit = _CHUNK_BYTES.get(jax.default_backend(), _CHUNK_BYTES_ELSEWHERE)
    parts = -(-4 * scores.size // limit)
    chunk = -(-rows // min(parts, rows))  # equal ones: the last overlaps the one before it by less than `parts` rows

    def one_chunk(number: Int[Array, ""], chosen: Bool[Array, "row in"]) -> Bool[Array, "row in"]:
        start = jnp.minimum(number * chunk, rows - chunk)
        slices = [jax.lax.dynamic_slice_in_dim(array, start, chunk) for array in (scores, counts, ties)]
        return jax.lax.dynamic_update_slice_in_dim(chosen, _select_chunk(*slices), start, 0)

    if chunk == rows:
        return _select_chunk(scores, counts, ties)
    return jax.lax.fori_loop(0, -(-rows // chunk), one_chunk, jnp.zeros(scores.shape, bool))


@_select.def_vmap
def _select_batch(size: int, batched: list[bool], *arrays: Array) -> tuple[Array, bool]:
    whole = [
        x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_batched in zip(arrays, batched, strict=True)
    ]
    chosen = _select(*(x.reshape(-1, *x.shape[2:]) for x in whole))
    return chosen.reshape(whole[0].shape), True


@jax.jit  # traced once for all linears of a shape, in all programs
def _select_chunk(
    scores: Float[Array, "row in"], counts: Int[Array, "row"], ties: Int[Array, "row"]
) -> Bool[Array, "row in"]:
    keys = _ordered_bits(scores)
    threshold = _kth_smallest(keys, counts, 32)
    chosen = (keys <= threshold[:, None]) & (counts > 0)[:, None]
    several = (counts > 0) & (ties != TIES_ALL) & (_count_below(keys, threshold + 1) != counts)
    return jax.lax.cond(jnp.any(several), lambda: _break_ties(keys, threshold, counts, ties), lambda: chosen)


def _break_ties(
    keys: UInt[Array, "row in"], threshold: UInt[Array, "row"], counts: Int[Array, "row"], ties: Int[Array, "row"]
) -> Bool[Array, "row in"]:
    """As many of the keys that equal the threshold as are wanted: again the smallest ones, but of their places."""
    columns = keys.shape[1]
    equal = keys == threshold[:, None]
    wanted = counts - _count_below(keys, threshold)
    forward = jnp.arange(columns, dtype=jnp.uint32)
    place = jnp.where((ties == TIES_HIGH)[:, None], columns - 1 - forward, forward)
    place = jnp.where(equal, place, columns)
    last = jnp.where(ties == TIES_ALL, columns - 1, _kth_smallest(place, wanted, columns.bit_length()))
    return (keys < threshold[:, None]) | ((place <= last[:, None]) & (wanted > 0)[:, None])


def _ordered_bits(scores: Float[Array, "row in"]) -> UInt[Array, "row in"]:
    """Unsigned integers in the order of the floats they stand for."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    sign = jnp.uint32(0x80000000)
    bits = jnp.where(bits == sign, 0, bits)  # -0.0
    return jnp.where(bits & sign, ~bits, bits | sign)


def _kth_smallest(keys: UInt[Array, "row in"], counts: Int[Array, "row"], bits: int) -> UInt[Array, "row"]:
    """The largest t below `2^bits` of each row with fewer than `counts` keys below it.

    First t's upper half, then, among the keys that share it, the lower one: half the bytes to pass over.
    """
    if bits <= 16:
        return _kth_smallest_half(keys.astype(jnp.uint16), counts, bits).astype(jnp.uint32)
    upper = (keys >> 16).astype(jnp.uint16)
    high = _kth_smallest_half(upper, counts, bits - 16)
    lower = jnp.where(upper == high[:, None], keys.astype(jnp.uint16), jnp.uint16(0xFFFF))  # others: below no bound
    low = _kth_smallest_half(lower, counts - _count_below(upper, high), 16)
    return high.astype(jnp.uint32) << 16 | low


def _kth_smallest_half(keys: UInt16[Array, "row in"], counts: Int[Array, "row"], bits: int) -> UInt16[Array, "row"]:
    """`_kth_smallest` of keys of at most 16 bits, bit by bit."""
    top = jnp.uint16(1 << (bits - 1))

    def decide(step: Int[Array, ""], found: UInt16[Array, "row"]) -> UInt16[Array, "row"]:
        trial = found | (top >> step.astype(jnp.uint16))
        return jnp.where(_count_below(keys, trial) < counts, trial, found)

    return jax.lax.fori_loop(0, bits, decide, jnp.zeros(keys.shape[0], jnp.uint16))


def _count_below(keys: UInt[Array, "row in"], bound: UInt[Array, "row"]) -> Int[Array, "row"]:
    """How many keys of each row are below its bound."""
    # XLA does not vectorise a sum along rows on a CPU, but it does a sum of pieces of a row, element by element.
    pieces = max(1, min(_PIECES.get(jax.default_backend(), 1), keys.shape[1] // _LANES))
    even = keys.shape[1] // pieces * pieces
    parts = keys[:, :even].reshape(len(keys), pieces, even // pieces)
    folded = jnp.sum(parts < bound[:, None, None], axis=1, dtype=keys.dtype)
    rest = keys[:, even:] < bound[:, None]
    return jnp.sum(folded, axis=1, dtype=jnp.int32) + jnp.sum(rest, axis=1, dtype=jnp.int32)
