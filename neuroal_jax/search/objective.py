"""The registry of search objectives: what a search makes as small as it can. Imports no JAX."""

from neuroal_jax.registry import Entry, Registry

# A module has `score(dense, pruned)`: of the norms `[in]` of an input in the dense and in the pruned run.
OBJECTIVES = Registry(
    "neuroal_jax.numerics",
    {"alignment": Entry(help="how much pruning changes the pattern of every linear's input")},
)
