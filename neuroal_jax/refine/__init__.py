"""The registry of refinements, which mend a pruned model: which weights are kept, or their values. Imports no JAX."""

from collections.abc import Mapping
from dataclasses import dataclass

from neuroal_jax.registry import Entry, Option, Registry

NONE = "none"  # leaves pruned weights as they are


@dataclass(frozen=True, kw_only=True)
class Refinement(Entry):
    """A refinement: of masks, or, with `updates_weights`, of the kept weights.

    The module of one of masks has `refine(mask, weight, statistics, linear, pattern, settings) -> mask`, all
    `[out, in]`: as many kept as before, of every set of the pattern that competes. In exact runs it grows no weight
    back that is zero anyway: the zeros that are written would be one more.

    The module of one that updates weights has `update(weight, start, mask, products, settings) -> Solution` (see
    `numerics/least_squares.py`), of all linears that read an input, one below the other: the dense weights and the
    pruned ones.

    It may also have `memory(linears, shapes)`: bytes that it takes while a block is refined, and `COMPILER_BYTES`: to
    compile and to hold its programs.

    Attributes:
        needs: Statistics of each input that a refinement of masks uses.
        updates_weights: Whether kept weights change, so that masks alone do not hold the result.
        dense_share: The option that says how much the dense block whose outputs weights are to give reads of what it
            reads in the dense model, rather than of what comes out of the pruned blocks before it; None: nothing.
        in_search: Pairs of options: the former is at most the latter where candidates of a search are refined, which
            are many and need only be told apart.
    """

    needs: tuple[str, ...] = ()
    updates_weights: bool = False
    dense_share: str | None = None
    in_search: tuple[tuple[str, str], ...] = ()


def _chains(entries: Mapping[str, Refinement]) -> tuple[str, ...]:
    """What can be asked for: each alone, or one of masks and then, on what it kept, one of weights."""
    updates = [name for name, entry in entries.items() if entry.updates_weights]
    masks = [name for name in entries if name not in updates]
    return (*entries, *(f"{first}+{then}" for first in masks for then in updates))


REFINEMENTS = Registry(
    "neuroal_jax.refine",
    {
        "dsnot": Refinement(
            help="DSnoT swaps pruned for kept weights",
            needs=("squares", "sums", "variances"),
            options=(
                Option("dsnot_cycles", 50, "DSnoT: most swaps per row", low=1),
                Option("dsnot_threshold", 0.1, "DSnoT: rows with at most this error are left alone"),
            ),
        ),
        "refit": Refinement(
            help="least squares on the kept weights, so that outputs are the dense ones again",
            options=(
                Option(
                    "refit_damping",
                    0.1,
                    "refit: how firmly weights hold to what they were, by the mean square of the inputs",
                    high=1e6,
                ),
                Option("refit_iterations", 8, "refit: most steps of conjugate gradients", low=1),
                Option("refit_search_iterations", 5, "refit: most of a candidate, with --search-refine", low=1),
                Option(
                    "refit_dense_share",
                    0.5,
                    "refit: share of the dense model in what the dense block reads; the rest is of pruned blocks",
                    high=1,
                ),
            ),
            updates_weights=True,
            dense_share="refit_dense_share",
            in_search=(("refit_iterations", "refit_search_iterations"),),
        ),
    },
)
CHAINS = _chains(REFINEMENTS)
