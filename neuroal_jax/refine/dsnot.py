"""DSnoT (Zhang et al., 2024): swap pruned for kept weights, row by row, until the expected output is right again."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from neuroal_jax.masks.patterns import Pattern
from neuroal_jax.models.family import LinearSpec, Shapes
from neuroal_jax.numerics.statistics import Statistics, norms, running_mean
from neuroal_jax.pruners import wanda
from neuroal_jax.registry import Settings

COMPILER_BYTES = 60 * 2**20
_BYTES = 36  # per weight: contributions, scores, gains, two sorts with their keys


def memory(linears: Sequence[LinearSpec], shapes: Shapes) -> int:
    """Bytes while one linear after the other is refined: sorts of the widest."""
    del linears
    return _BYTES * max(map(math.prod, shapes.values()))


class _Queue(NamedTuple):
    """Column numbers of each row in the order in which they are taken: from the front, or from the back.

    Attributes:
        columns: Column numbers; of each row the first `length` count.
        length: How many there are.
        front: How many of them, from the front, may be taken there; `back` likewise.
    """

    columns: Int[Array, "out in"]
    length: Int[Array, "out"]
    front: Int[Array, "out"]
    back: Int[Array, "out"]


class _State(NamedTuple):
    """Rows in the middle of a refinement: mask, error, whether they go on, how often each end was taken."""

    cycle: Int[Array, ""]
    mask: Bool[Array, "out in"]
    error: Float[Array, "out"]
    active: Bool[Array, "out"]
    over: Int[Array, "out"]  # cycles in which the error was positive
    under: Int[Array, "out"]


def refine(
    mask: Bool[Array, "out in"],
    weight: Float[Array, "out in"],
    statistics: Statistics,
    linear: LinearSpec,
    pattern: Pattern,
    settings: Settings,
) -> Bool[Array, "out in"]:
    """A mask with (in `exact` runs) the same number of kept weights in every row. The MLP's masks stay as they are.

    With the expected contributions `m = W * e`, e_j the mean over sequences of the sum over tokens of x_j, a row's
    error is the sum of m over what is pruned. In each cycle the row grows back the pruned weight with the largest
    `m / v` (v the variance of x_j) if the error is positive, else the one with the smallest; and prunes the kept weight
    with the smallest Wanda score among those whose m has the error's opposite sign. Every candidate is used once; a row
    that runs out of either kind stops. Where weights change places among neighbours only, the one that is pruned is of
    the group of the one that grows; if that group has none, the next one grows.

    Args:
        mask: The base pruner's (True = kept).
        weight: The dense weight.
        statistics: Of its input; `squares`, `sums` and `variances`.
        linear: Which linear of the block it is.
        pattern: Within how many neighbours weights change places.
        settings: Cycles: most swaps per row; threshold: a row whose error is at most this, in absolute value, is left
            alone. With `reference` the released code is repeated, which walks on in rows that are done and writes the
            opposite there, and takes candidates of the wrong sign where its two pointers cross.
    """
    if linear.in_mlp:
        return mask
    cycles, threshold = settings["dsnot_cycles"], settings["dsnot_threshold"]
    weight = weight.astype(jnp.float32)
    contributions = weight * running_mean(statistics["sums"])
    # What is zero anyway is not grown back: it would add nothing, and another weight would go for it.
    growable = ~mask if settings.reference else ~mask & (weight != 0)
    growing = _growing(growable, contributions, running_mean(statistics["variances"]), settings.reference)
    scores = wanda.scores(weight, norms(statistics["squares"]))
    if pattern.neighbours is not None:
        return _among_neighbours(mask, growing, contributions, scores, pattern.neighbours, cycles, threshold)
    pruning = _pruning(mask, contributions, scores)
    rows = jnp.arange(weight.shape[0])

    def cycle(state: _State) -> _State:
        positive = state.error > 0
        active = state.active & (jnp.abs(state.error) > threshold)
        # A positive error grows from the back and prunes from the front; a negative one the other way round.
        grow_at = jnp.where(positive, growing.length - 1 - state.over, state.under)
        prune_at = jnp.where(positive, state.over, pruning.length - 1 - state.under)
        if not settings.reference:
            active &= state.over + state.under < growing.length
            active &= jnp.where(positive, state.over < pruning.front, state.under < pruning.back)
        grown = jnp.take_along_axis(growing.columns, grow_at[:, None], axis=1, mode="clip")[:, 0]
        pruned = jnp.take_along_axis(pruning.columns, prune_at[:, None], axis=1, mode="clip")[:, 0]
        if settings.reference:
            mask = state.mask.at[rows, pruned].set(~active).at[rows, grown].set(active)
        else:
            mask = state.mask.at[rows, pruned].min(~active).at[rows, grown].max(active)
        change = contributions[rows, pruned] - contributions[rows, grown]
        return _State(
            state.cycle + 1,
            mask,
            state.error + jnp.where(active, change, 0),
            active,
            state.over + positive,
            state.under + ~positive,
        )

    def goes_on(state: _State) -> Bool[Array, ""]:
        return (state.cycle < min(cycles, weight.shape[1])) & jnp.any(state.active)

    none = jnp.zeros(weight.shape[0], jnp.int32)
    error = jnp.sum(jnp.where(mask, 0, contributions), axis=1)
    start = _State(jnp.int32(0), mask, error, jnp.ones(weight.shape[0], bool), none, none)
    return jax.lax.while_loop(goes_on, cycle, start).mask


class _GroupState(NamedTuple):
    """Rows in the middle of a refinement among neighbours.

    Attributes:
        mask: True = kept.
        error: Of each row.
        active: Whether a row goes on.
        over: How many candidates to grow were taken from the back, as the error was positive; `under` from the front.
        swaps: How many weights changed places.
        free: Whether a weight was kept from the beginning, and still is.
    """

    mask: Bool[Array, "out in"]
    error: Float[Array, "out"]
    active: Bool[Array, "out"]
    over: Int[Array, "out"]
    under: Int[Array, "out"]
    swaps: Int[Array, "out"]
    free: Bool[Array, "out in"]


def _among_neighbours(
    mask: Bool[Array, "out in"],
    growing: _Queue,
    contributions: Float[Array, "out in"],
    scores: Float[Array, "out in"],
    size: int,
    cycles: int,
    threshold: float,
) -> Bool[Array, "out in"]:
    """`refine` where a weight changes places with one of its `size` neighbours."""
    rows = jnp.arange(mask.shape[0])

    def cycle(state: _GroupState) -> _GroupState:
        positive = state.error > 0
        active = state.active & (jnp.abs(state.error) > threshold) & (state.swaps < cycles)
        active &= state.over + state.under < growing.length
        place = jnp.where(positive, growing.length - 1 - state.over, state.under)
        grown = jnp.take_along_axis(growing.columns, place[:, None], axis=1, mode="clip")[:, 0]
        group = (grown // size * size)[:, None] + jnp.arange(size)
        of_group, score, free = (
            jnp.take_along_axis(array, group, axis=1) for array in (contributions, scores, state.free)
        )
        fitting = free & jnp.where(positive[:, None], of_group < 0, of_group > 0)
        pruned = group[rows, jnp.argmin(jnp.where(fitting, score, jnp.inf), axis=1)]
        swapped = active & jnp.any(fitting, axis=1)
        change = contributions[rows, pruned] - contributions[rows, grown]
        return _GroupState(
            state.mask.at[rows, pruned].min(~swapped).at[rows, grown].max(swapped),
            state.error + jnp.where(swapped, change, 0),
            active,
            state.over + (active & positive),
            state.under + (active & ~positive),
            state.swaps + swapped,
            state.free.at[rows, pruned].min(~swapped),
        )

    none = jnp.zeros(mask.shape[0], jnp.int32)
    error = jnp.sum(jnp.where(mask, 0, contributions), axis=1)
    start = _GroupState(mask, error, jnp.ones(mask.shape[0], bool), none, none, none, mask)
    return jax.lax.while_loop(lambda state: jnp.any(state.active), cycle, start).mask


def _growing(
    growable: Bool[Array, "out in"],
    contributions: Float[Array, "out in"],
    variances: Float[Array, "in"],
    reference: bool,
) -> _Queue:
    """The pruned weights by ascending `m / v`; in `reference` among all others, which stand there as 0."""
    gain = contributions / variances
    if reference:
        columns = jnp.argsort(jnp.where(growable, gain, 0), axis=1, stable=True)
        length = jnp.full(growable.shape[0], growable.shape[1])
    else:  # an input without variance: 0/0 gains nothing, else the gain is as large as numbers get
        columns = jnp.argsort(jnp.where(growable, jnp.nan_to_num(gain), jnp.inf), axis=1, stable=True)
        length = jnp.sum(growable, axis=1)
    return _Queue(columns, length, length, length)


def _pruning(mask: Bool[Array, "out in"], contributions: Array, scores: Float[Array, "out in"]) -> _Queue:
    """The kept weights with m < 0 by ascending score, then the kept ones with m > 0 by descending score."""
    negative, positive = mask & (contributions < 0), mask & (contributions > 0)
    order = jnp.argsort(jnp.where(negative, scores, jnp.inf), axis=1, stable=True)
    back, front = jnp.sum(positive, axis=1), jnp.sum(negative, axis=1)
    descending = jnp.argsort(jnp.where(positive, -scores, jnp.inf), axis=1, stable=True)
    place = jnp.arange(mask.shape[1])[None, :]
    shifted = jnp.take_along_axis(descending, (place - front[:, None]) % mask.shape[1], axis=1)
    return _Queue(jnp.where(place < front[:, None], order, shifted), front + back, front, back)
