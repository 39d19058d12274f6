"""What is computed on one block: the programs of a walk.

Each is compiled once for what it is specialised to (its static arguments) and its arrays' shapes. Block number,
lambdas, sparsities and counts are traced values, so every block and every candidate runs the same program, in every
run of a process. Linears arrive as `W[out, in]`; the transpose to Flax kernels happens in `_forward` and nowhere else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Bool, Float, Int, Integer, UInt8

from neuroal_jax.machine.programs import program
from neuroal_jax.models.family import LinearSpec
from neuroal_jax.numerics import least_squares
from neuroal_jax.numerics.least_squares import Products
from neuroal_jax.numerics.selection import Quotas
from neuroal_jax.numerics.statistics import STATISTICS, Statistics, measure, norms
from neuroal_jax.refine import NONE
from neuroal_jax.walk.method import Method, Update

Objective = Callable[[Float[Array, "in"], Float[Array, "in"]], Float[Array, ""]]  # of dense and pruned norms
Inputs = dict[str, Float[Array, "b t _"]]  # of a block's linears, by name
StatisticsOfInputs = dict[str, Statistics]


@dataclass(frozen=True)
class BlockSpec:
    """What every program of a block is specialised to: the block's structure and its linears."""

    graph: nnx.GraphDef
    linears: tuple[LinearSpec, ...]


class Weights(NamedTuple):
    """A block's parameters on the device: linears as `W[out, in]`, the rest by Flax path."""

    linears: dict[str, Float[Array, "out in"]]
    rest: dict[str, Array]


def module_from(graph: nnx.GraphDef, params: dict[str, Array]) -> Any:
    """A Flax module from its structure and its parameters by dotted path."""
    return nnx.merge(graph, unflatten_dict(params, sep="."))


def _forward(
    spec: BlockSpec, weights: Weights, hidden: Float[Array, "b t d"], known: Inputs | None = None
) -> tuple[Float[Array, "b t d"], Inputs]:
    """The block's output and the inputs of its linears by name.

    Linears read `known` inputs as they are given: XLA drops what only computes them.
    """
    kernels = {f"{name}.kernel": weight.T for name, weight in weights.linears.items()}
    block = module_from(spec.graph, {**weights.rest, **kernels})
    for linear in spec.linears:
        if known and linear.reads in known:
            *path, name = linear.name.split(".")
            parent = reduce(getattr, path, block)
            vars(parent)[name] = partial(_read, getattr(parent, name), known[linear.reads])
    output, inputs = block(hidden)
    return output, {**inputs, **(known or {})}


def _read(linear: nnx.Linear, known: Float[Array, "b t in"], computed: Float[Array, "b t in"]) -> Array:
    """The output of a linear whose input is known."""
    del computed
    return linear(known)


@program(static=1)
def embed(graph: nnx.GraphDef, params: dict[str, Array], tokens: Integer[Array, "b t"]) -> Float[Array, "b t d"]:
    """Tokens to the first block's input."""
    return module_from(graph, params)(tokens)


@program(static=1, donate="hidden")
def run(spec: BlockSpec, weights: Weights, hidden: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The block's output."""
    return _forward(spec, weights, hidden)[0]


State = dict[str, dict[str, Array]]  # of statistics that are being streamed: by input, then by statistic


def _updated(inputs: dict[str, Array], state: State, first: Int[Array, ""], total: Int[Array, ""]) -> State:
    return {
        name: {kind: STATISTICS[kind].update(before, inputs[name], first, total) for kind, before in of_input.items()}
        for name, of_input in state.items()
    }


@program(static=1, donate="state")
def add_statistics(
    spec: BlockSpec,
    weights: Weights,
    hidden: Float[Array, "b t d"],
    state: State,
    first: Int[Array, ""],
    total: Int[Array, ""],
) -> State:
    """Takes a batch into the statistics of every linear input; `first` sequences came before, of `total` ones."""
    return _updated(_forward(spec, weights, hidden)[1], state, first, total)  # XLA drops the unused last product


@program(static=1, donate="hidden")
def observe(
    spec: BlockSpec,
    weights: Weights,
    hidden: Float[Array, "b t d"],
    state: State,
    first: Int[Array, ""],
    total: Int[Array, ""],
) -> tuple[Float[Array, "b t d"], State]:
    """The block's output, and `add_statistics`."""
    hidden, inputs = _forward(spec, weights, hidden)
    return hidden, _updated(inputs, state, first, total)


@program(static=1)
def inputs(spec: BlockSpec, weights: Weights, hidden: Float[Array, "b t d"]) -> dict[str, Float[Array, "b t in"]]:
    """The inputs of the block's linears by name. XLA drops what comes after the last of them."""
    return _forward(spec, weights, hidden)[1]


@program(donate="state")
def add_inputs(
    inputs: dict[str, Float[Array, "b t in"]], state: State, first: Int[Array, ""], total: Int[Array, ""]
) -> State:
    """As `add_statistics`, of inputs that are there already."""
    return _updated(inputs, state, first, total)


class _Chosen(NamedTuple):
    """A block's pruned weights, its masks (True = kept) and, per input, the damping (see `PrunedBlock`)."""

    weights: Weights
    masks: dict[str, Bool[Array, "out in"]]
    damping: dict[str, Int[Array, ""]]


def _prune(
    spec: BlockSpec, method: Method, weights: Weights, statistics: StatisticsOfInputs, quotas: Quotas
) -> _Chosen:
    """Prunes all linears of a block, without refining them."""
    inputs = dict.fromkeys(linear.reads for linear in spec.linears)
    prepared = {name: method.prepare(statistics.get(name, {})) for name in inputs}
    kept, masks = {}, {}
    for linear in spec.linears:
        name = linear.name
        kept[name], masks[name] = method.prune(weights.linears[name], prepared[linear.reads], quotas[name])
    return _Chosen(Weights(kept, weights.rest), masks, method.damping(prepared))


def _refine(
    spec: BlockSpec, method: Method, weights: Weights, statistics: StatisticsOfInputs, chosen: _Chosen
) -> _Chosen:
    """Refines the masks of a block."""
    masks = {
        linear.name: method.refine(
            chosen.masks[linear.name], weights.linears[linear.name], statistics[linear.reads], linear
        )
        for linear in spec.linears
    }
    kept = {name: jnp.where(mask, weights.linears[name], 0) for name, mask in masks.items()}
    return chosen._replace(weights=Weights(kept, weights.rest), masks=masks)


class PrunedBlock(NamedTuple):
    """A block after pruning.

    Attributes:
        weights: Zeros where the masks prune; the kept weights too may have changed.
        packed: The masks, packed along the input axis, 1 = kept.
        damping: Per input, the index into `cholesky.DAMPING` that its Hessian took; empty for pruners without one.
    """

    weights: Weights
    packed: dict[str, UInt8[Array, "out bytes"]]
    damping: dict[str, Int[Array, ""]]


@program(static=2)
def prune(
    spec: BlockSpec, method: Method, weights: Weights, statistics: StatisticsOfInputs, quotas: Quotas
) -> PrunedBlock:
    """Prunes all linears of a block, with the pruner and then the refinement, which is one of masks."""
    chosen = _prune(spec, method, weights, statistics, quotas)
    if method.refinement != NONE:
        chosen = _refine(spec, method, weights, statistics, chosen)
    packed = {name: jnp.packbits(mask, axis=1) for name, mask in chosen.masks.items()}
    return PrunedBlock(chosen.weights, packed, chosen.damping)


@program()
def mean(
    hidden: Float[Array, "b t d"], of_dense: Float[Array, "b t d"], share: Float[Array, ""]
) -> Float[Array, "b t d"]:
    """Hidden states with a `share` of the dense model's."""
    return ((1 - share) * hidden + share * of_dense).astype(hidden.dtype)


class InputsOfBoth(NamedTuple):
    """Inputs of a batch in the pruned block, `now`, and in the dense one, `then`."""

    now: Inputs
    then: Inputs


@program(static=2, donate="before")
def add_products(
    spec: BlockSpec,
    name: str,
    dense: Weights,
    pruned: Weights,
    hidden: Float[Array, "b t d"],
    aim: Float[Array, "b t d"],
    known: InputsOfBoth,
    before: Products,
    first: Int[Array, ""],
    total: Int[Array, ""],
) -> tuple[Products, InputsOfBoth]:
    """Takes a batch into the products of the input `name`; `first` sequences came before, of `total` ones.

    The pruned block reads `hidden`, the dense one `aim`. XLA drops what comes after that input in both, and what leads
    to inputs that are known.

    Returns:
        The products, and that input, for those after it.
    """
    now = _forward(spec, pruned, hidden, known.now)[1][name]
    then = _forward(spec, dense, aim, known.then)[1][name]
    weight = jnp.concatenate([dense.linears[linear.name] for linear in spec.linears if linear.reads == name])
    counted = first + jnp.arange(hidden.shape[0]) < total
    products = least_squares.add_products(before, now, then, weight, counted)
    return products, InputsOfBoth({name: now}, {name: then})


class Updated(NamedTuple):
    """Linears that read one input, their kept weights changed.

    Attributes:
        weights: fp32, zeros where the masks prune.
        errors: How far each one's output is from the dense one, before and after, as a share of its size.
        iterations: How many it took, for all of them.
    """

    weights: dict[str, Float[Array, "out in"]]
    errors: dict[str, Float[Array, "2"]]
    iterations: Int[Array, ""]


@program(static=1)
def update_weights(
    update: Update,
    dense: dict[str, Float[Array, "out in"]],
    pruned: dict[str, Float[Array, "out in"]],
    packed: dict[str, UInt8[Array, "out bytes"]],
    products: Products,
) -> Updated:
    """Changes the kept weights of linears that read one input, all at once."""
    width = products.gram.shape[0]
    stacked = [jnp.concatenate([of_linears[name] for name in dense]) for of_linears in (dense, pruned, packed)]
    mask = jnp.unpackbits(stacked[2], axis=1, count=width).astype(bool)
    found = update(stacked[0], stacked[1], mask, products)
    ends = np.cumsum([len(weight) for weight in dense.values()])[:-1]

    def of_each(rows: Array) -> dict[str, Array]:
        return dict(zip(dense, jnp.split(rows, ends), strict=True))

    sizes = of_each(jnp.stack([found.before, found.after, found.dense], axis=1))
    sums = {name: jnp.sum(rows, axis=0) for name, rows in sizes.items()}
    errors = {name: jnp.sqrt(total[:2] / jnp.where(total[2] > 0, total[2], 1)) for name, total in sums.items()}
    return Updated(of_each(found.weight), errors, found.iterations)


@program()
def apply_masks(weights: Weights, packed: dict[str, UInt8[Array, "out bytes"]]) -> Weights:
    """Zeros what packed masks prune."""

    def masked(name: str, weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
        return jnp.where(jnp.unpackbits(packed[name], axis=1, count=weight.shape[1]), weight, 0)

    return Weights({name: masked(name, weight) for name, weight in weights.linears.items()}, weights.rest)


def _dense_run(
    spec: BlockSpec, needs: tuple[str, ...], weights: Weights, hidden: Float[Array, "b t d"]
) -> StatisticsOfInputs:
    """The statistics `needs` of every linear input. XLA drops the unused last product."""
    return {name: measure(x, needs) for name, x in _forward(spec, weights, hidden)[1].items()}


@program(static=2)
def dense_run(
    spec: BlockSpec, needs: tuple[str, ...], weights: Weights, hidden: Float[Array, "b t d"]
) -> StatisticsOfInputs:
    """Statistics of the dense block: of one candidate, or of all where nothing is pruned before it."""
    return _dense_run(spec, needs, weights, hidden)


@program(static=2)
def dense_runs(
    spec: BlockSpec, needs: tuple[str, ...], weights: Weights, hidden: Float[Array, "c b t d"]
) -> StatisticsOfInputs:
    """Statistics of the dense block behind every candidate's pruned blocks, `[candidate, ...]`."""
    return _of_each(lambda hidden: _dense_run(spec, needs, weights, hidden), hidden)


class Candidates(NamedTuple):
    """A block pruned as each candidate says, `[candidate, ...]`.

    Attributes:
        kept: The pruned linears, in the compute dtype.
        damping: As in `PrunedBlock`.
    """

    kept: dict[str, Float[Array, "candidate out in"]]
    damping: dict[str, Int[Array, "candidate"]]


def _of_each(function: Callable[..., Any], *of_candidates: Any) -> Any:
    """`vmap`, but one candidate alone goes without: XLA folds transposes of weights into products, not into batches."""
    if jax.tree.leaves(of_candidates)[0].shape[0] > 1:
        return jax.vmap(function)(*of_candidates)
    alone = jax.tree.map(lambda x: x[0], of_candidates)
    return jax.tree.map(lambda x: x[None], function(*alone))


@program(static=2)
def prune_candidates(
    spec: BlockSpec, method: Method, weights: Weights, statistics: StatisticsOfInputs, quotas: Quotas
) -> Candidates:
    """Prunes a block as each candidate says, `statistics` and `quotas` being theirs; no refinement."""

    def of_candidate(statistics: StatisticsOfInputs, quotas: Quotas) -> Candidates:
        block = _prune(spec, method, weights, statistics, quotas)
        kept = {name: weight.astype(weights.linears[name].dtype) for name, weight in block.weights.linears.items()}
        return Candidates(kept, block.damping)

    return _of_each(of_candidate, statistics, quotas)


class Comparison(NamedTuple):
    """What one block says about each candidate.

    Attributes:
        hidden: The next block's input; None where no one reads it.
        scores: The objective of each linear; None without one.
        differences: `D - S` of each input.
    """

    hidden: Float[Array, "candidate b t d"] | None
    scores: Float[Array, "candidate linear"] | None
    differences: dict[str, Float[Array, "candidate in"]]


def _compare(
    spec: BlockSpec,
    objective: Objective | None,
    rest: dict[str, Array],
    kept: dict[str, Float[Array, "c out in"]],
    hidden: Float[Array, "c b t d"],
    statistics: StatisticsOfInputs,
    counted: Float[Array, "b"],
) -> Comparison:
    """Runs the block as each candidate pruned it and compares its inputs with the dense ones."""

    def pattern(statistics: StatisticsOfInputs) -> dict[str, Array]:
        return {name: norms(of_input["squares"] * counted[:, None]) for name, of_input in statistics.items()}

    def of_candidate(kept: dict[str, Array], hidden: Array, statistics: StatisticsOfInputs) -> Comparison:
        dense = pattern(statistics)
        hidden, inputs = _forward(spec, Weights(kept, rest), hidden)
        pruned = pattern({name: measure(x, ("squares",)) for name, x in inputs.items()})
        scores = None
        if objective is not None:
            scores = jnp.stack([objective(dense[linear.reads], pruned[linear.reads]) for linear in spec.linears])
        return Comparison(hidden, scores, {name: dense[name] - pruned[name] for name in dense})

    return _of_each(of_candidate, kept, hidden, statistics)


@program(static=2, donate="hidden")
def compare(
    spec: BlockSpec,
    objective: Objective | None,
    rest: dict[str, Array],
    kept: dict[str, Float[Array, "c out in"]],
    hidden: Float[Array, "c b t d"],
    statistics: StatisticsOfInputs,
    counted: Float[Array, "b"],
) -> Comparison:
    """Compares all candidates at once.

    Args:
        spec: The block.
        objective: Of an input's norms in the dense and in the pruned run; None: only `D - S` is asked for.
        rest: The parameters of the block that are not pruned.
        kept: The pruned linears.
        hidden: The block's input.
        statistics: Of the inputs in the dense run.
        counted: By what each sequence counts in the norms.
    """
    return _compare(spec, objective, rest, kept, hidden, statistics, counted)


@program(static=2)
def compare_last(
    spec: BlockSpec,
    objective: Objective | None,
    rest: dict[str, Array],
    kept: dict[str, Float[Array, "c out in"]],
    hidden: Float[Array, "c b t d"],
    statistics: StatisticsOfInputs,
    counted: Float[Array, "b"],
) -> Comparison:
    """`compare` in the last block, whose output no one reads: XLA drops what it takes."""
    return _compare(spec, objective, rest, kept, hidden, statistics, counted)._replace(hidden=None)


@program(static=1, donate="hidden")
def run_candidates(
    spec: BlockSpec,
    rest: dict[str, Array],
    kept: dict[str, Float[Array, "c out in"]],
    hidden: Float[Array, "c b t d"],
) -> Float[Array, "c b t d"]:
    """The block's output as each candidate pruned it."""
    found: Array = _of_each(lambda kept, hidden: _forward(spec, Weights(kept, rest), hidden)[0], kept, hidden)
    return found
