"""The registry of allocations: how much of every block, linear and row is pruned. Imports no JAX."""

from dataclasses import dataclass

from neuroal_jax.registry import Entry, Option, Registry


@dataclass(frozen=True, kw_only=True)
class AllocationEntry(Entry):
    """An allocation; its module has `allocate(problem)`, which gives a `Decision` (see `allocation/problem.py`).

    Its module may also have

    - `stage_sizes(options, sparsity)`: the number of candidates of each of its stages, for one that searches;
    - `settle(options, by_row)`: options that change where the pattern does not tell rows apart, by name; raises
      IllegalCombination for what makes no sense then.

    Attributes:
        needs: Statistics of the dense model's inputs that it measures over the calibration set.
        searches: Whether it scores candidates, so that the options of a search have an effect.
        hurts_updates: Whether refinements that update weights were measured to end worse on it than on `uniform`.
        highest: The largest sparsity that it may give to a linear; above 1 the budget cuts it.
    """

    needs: tuple[str, ...] = ()
    searches: bool = False
    hurts_updates: bool = False
    highest: float = 1


ALLOCATIONS = Registry(
    "neuroal_jax.allocation",
    {
        "uniform": AllocationEntry(help="the same everywhere"),
        "neuroal": AllocationEntry(
            help="NeuroAL", searches=True, hurts_updates=True, module="neuroal_jax.search.neuroal"
        ),
        "owl": AllocationEntry(
            help="OWL",
            needs=("squares",),
            options=(
                Option("owl_m", 5.0, "OWL: outliers exceed this many times the mean score"),
                Option("owl_lambda", 0.08, "OWL: half the span of the densities", high=0.5),
            ),
        ),
        "alpha": AllocationEntry(
            help="AlphaPruning",
            options=(Option("alpha_epsilon", 0.3, "AlphaPruning: half the span of the ratios", high=1),),
            highest=1000,
        ),
    },
)
