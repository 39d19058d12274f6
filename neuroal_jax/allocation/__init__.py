"""The registry of allocations: how much of every block, linear and row is pruned. Imports no JAX."""

from dataclasses import dataclass

from neuroal_jax.registry import Entry, Option, Registry


@dataclass(frozen=True, kw_only=True)
class AllocationEntry(Entry):
    """An allocation; its module has `allocate(problem)`, which gives a `Decision` (see `allocation/problem.py`).

    Its module may also have

    - `stage_sizes(options, sparsity)`: the most candidates of each of its stages, for one that searches;
    - `lone_walks(options)`: how many times one candidate walks alone beside these, for one that searches;
    - `settle(options, rows_alike)`: options that change where rows cannot be told apart, by name, and `rows_alike` says
      why they cannot; raises IllegalCombination for what makes no sense then.

    Attributes:
        needs: Statistics of the dense model's inputs that it measures over the calibration set.
        searches: Whether it scores candidates, so that the options of a search have an effect.
        hurts_updates: Whether refinements that update weights were measured to end worse on it than on `uniform`.
        steps: Whether its search has NeuroAL's steps, so that `--step` and their lambdas have an effect.
        highest: The largest sparsity that it may give to a linear; above 1 the budget cuts it.
        objective: What it searches by where none is asked for.
    """

    needs: tuple[str, ...] = ()
    searches: bool = False
    hurts_updates: bool = False
    steps: bool = False
    highest: float = 1
    objective: str = "alignment"


ALLOCATIONS = Registry(
    "neuroal_jax.allocation",
    {
        "uniform": AllocationEntry(help="the same everywhere"),
        "neuroal": AllocationEntry(
            help="NeuroAL", searches=True, steps=True, hurts_updates=True, module="neuroal_jax.search.neuroal"
        ),
        "owl": AllocationEntry(
            help="OWL",
            needs=("squares",),
            options=(
                Option("owl_m", 5.0, "OWL: outliers exceed this many times the mean score"),
                Option("owl_lambda", 0.08, "OWL: half the span of the densities", high=0.5),
            ),
        ),
        "dlp": AllocationEntry(
            help="DLP",
            needs=("squares",),
            options=(Option("dlp_lambda", 0.1, "DLP: half the span of the densities", high=0.5),),
        ),
        "alpha": AllocationEntry(
            help="AlphaPruning",
            options=(Option("alpha_epsilon", 0.3, "AlphaPruning: half the span of the ratios", high=1),),
            highest=1000,
        ),
        "shape": AllocationEntry(
            help="a search over shapes in depth, kinds of linears and rows",
            needs=("squares",),
            searches=True,
            objective="kl",
            module="neuroal_jax.search.shape",
            options=(
                Option("shape_ramps", (0.1, 0.2), "shape: lambdas of the ramps in depth among its profiles", high=0.5),
                Option("shape_depth", 4, "shape: waves in depth among its directions", high=64),
                Option("shape_width", 0.05, "shape: how far each direction is tried to and fro", low=0.001, high=0.5),
                Option("shape_step", 0.1, "shape: the longest step in a direction", high=0.5),
                Option("shape_etas", (0.33, 0.67, 1.0, 1.5, 2.0), "shape: multiples of all steps together", high=10),
                Option("shape_row_lambdas", (0.06, 0.12, 0.2), "shape: lambdas of the rows, or none", high=0.5),
                Option("shape_guard", 1.0, "shape: standard errors by which what a stage finds must be better; 0: any"),
            ),
        ),
    },
)
