"""The registry of pruners: how important is each weight. A pruner never decides how many weights go."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from neuroal_jax.numerics.selection import Quota, select_smallest
from neuroal_jax.numerics.statistics import Statistics, norms
from neuroal_jax.pruners import magnitude, multiflow, sparsegpt, wanda

Scores = Callable[[Float[Array, "out in"], Float[Array, "in"]], Float[Array, "out in"]]


class Pruned(NamedTuple):
    """A pruned weight, zeros where the mask is False, and the mask (True = kept)."""

    weight: Float[Array, "out in"]
    mask: Bool[Array, "out in"]


@dataclass(frozen=True)
class Pruner:
    """A pruner of 2-D weights.

    Attributes:
        needs: The fields of `Statistics` that it uses.
        prepare: Called once for each input, before the linears that share it: `prepare(statistics)`.
        prune: `prune(weight[out, in], prepared, quota, group) -> Pruned`; `group` is the number of columns that
            compete with each other, for pruners that choose over all rows.
        over_rows: Whether it chooses over all rows of a group of columns, instead of in each row.
        updates_weights: Whether kept weights change too, so that masks alone do not hold the result.
    """

    needs: frozenset[str]
    prepare: Callable[[Statistics], Any]
    prune: Callable[[Float[Array, "out in"], Any, Quota, int], Pruned]
    over_rows: bool = False
    updates_weights: bool = False


def _by_row(scores: Scores, *, reads_norms: bool = True) -> Pruner:
    """In each row the weights of the lowest `scores(weight[out, in], norms[in])` (fp32, non-negative) go."""

    def prune(weight: Float[Array, "out in"], norms: Float[Array, "in"], quota: Quota, group: int) -> Pruned:
        del group  # every row competes alone
        mask = ~select_smallest(scores(weight, norms), quota)
        return Pruned(jnp.where(mask, weight, 0), mask)

    if not reads_norms:
        return Pruner(frozenset(), lambda statistics: None, prune)
    return Pruner(frozenset({"squares"}), lambda statistics: norms(statistics.squares), prune)


def _sparsegpt() -> Pruner:
    def prune(weight: Float[Array, "out in"], factor: sparsegpt.Factor, quota: Quota, group: int) -> Pruned:
        return Pruned(*sparsegpt.prune(weight, factor, quota, group))

    def prepare(statistics: Statistics) -> sparsegpt.Factor:
        return sparsegpt.factorise(statistics.hessian)

    return Pruner(frozenset({"hessian"}), prepare, prune, over_rows=True, updates_weights=True)


PRUNERS = {
    "magnitude": _by_row(magnitude.scores, reads_norms=False),
    "wanda": _by_row(wanda.scores),
    "multiflow": _by_row(multiflow.scores),
    "sparsegpt": _sparsegpt(),
}
