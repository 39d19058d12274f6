"""The registry of refinements: they change which weights a mask keeps, never how many. Imports no JAX."""

from dataclasses import dataclass

from neuroal_jax.registry import Entry, Option, Registry

NONE = "none"  # leaves masks as they are


@dataclass(frozen=True, kw_only=True)
class Refinement(Entry):
    """A refinement. Its module has `refine(mask, weight, statistics, linear, settings) -> mask`, all `[out, in]`.

    In exact runs it grows no weight back that is zero anyway: the zeros that are written would be one more.

    It may also have `memory(shapes)`: bytes that it takes while a block is refined, and `COMPILER_BYTES`: to compile
    and to hold its programs.

    Attributes:
        needs: Statistics of each input that it uses.
    """

    needs: tuple[str, ...] = ()


REFINEMENTS = Registry(
    "neuroal_jax.refine",
    {
        "dsnot": Refinement(
            help="DSnoT swaps weights",
            needs=("squares", "sums", "variances"),
            options=(
                Option("dsnot_cycles", 50, "DSnoT: most swaps per row", low=1),
                Option("dsnot_threshold", 0.1, "DSnoT: rows with at most this error are left alone"),
            ),
        ),
    },
)
