"""The registry of pruners: how important is each weight. A pruner never decides how many weights go. Imports no JAX."""

from dataclasses import dataclass

from neuroal_jax.registry import Entry, Option, Registry


@dataclass(frozen=True, kw_only=True)
class Pruner(Entry):
    """A pruner of 2-D weights.

    Its module has one of

    - `scores(weight[out, in], prepared) -> [out, in]`, fp32 and non-negative: the lowest go;
    - `prune(weight[out, in], prepared, quota, pattern, settings) -> (weight[out, in], mask[out, in])`, True = kept, for
      one that changes the kept weights or chooses in its own way.

    It may also have

    - `prepare(statistics)`, called once for each input; what it gives is `prepared` for all linears that share it
      (without it: the statistics themselves);
    - `damping(prepared)`: index into `numerics.cholesky.DAMPING` of what an input's Hessian took;
    - `reference_weights(sequences)`: by what each sequence counts in the search of the released code;
    - `memory(shapes, widths)`: bytes that it takes beside a block's weights while the block is pruned;
    - `COMPILER_BYTES`: to compile and to hold its programs.

    Attributes:
        needs: Statistics of each input that it uses.
        pattern: Which weights compete (see `masks/patterns`).
        pattern_size: The option that is the pattern's size, for patterns that have one.
        updates_weights: Whether kept weights change too, so that masks alone do not hold the result.
    """

    needs: tuple[str, ...] = ()
    pattern: str = "rows"
    pattern_size: str | None = None
    updates_weights: bool = False


PRUNERS = Registry(
    "neuroal_jax.pruners",
    {
        "magnitude": Pruner(help="the smallest weights go"),
        "wanda": Pruner(help="size times the norm of the input", needs=("squares",)),
        "multiflow": Pruner(help="size times the flow through both ends", needs=("squares",)),
        "sparsegpt": Pruner(
            help="later columns make up for each error",
            needs=("hessian",),
            options=(Option("sparsegpt_group", 128, "SparseGPT: columns pruned together", low=1),),
            pattern="columns",
            pattern_size="sparsegpt_group",
            updates_weights=True,
        ),
    },
)
