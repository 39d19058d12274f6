"""What is computed on one block: the compiled functions of the walk.

Each is traced once per run: block number, lambdas, sparsities and counts are traced values, so every block and every
candidate runs the same program. Linears arrive as `W[out, in]`; the transpose to Flax kernels happens in `_forward` and
nowhere else.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Bool, Float, Int, UInt8

from neuroal_jax.models.family import LinearSpec
from neuroal_jax.numerics.alignment import alignment
from neuroal_jax.numerics.selection import Quota
from neuroal_jax.numerics.statistics import Inputs, Statistics, add_to_hessian, collect, hessian, norms
from neuroal_jax.pruners import PRUNERS, Pruner, sparsegpt, wanda
from neuroal_jax.refine import dsnot
from neuroal_jax.refine.dsnot import Dsnot

trace_counts: Counter[str] = Counter()


@dataclass(frozen=True)
class Method:
    """How weights are chosen, once it is known how many.

    Attributes:
        name: Of the pruner.
        group: Columns that compete with each other, for pruners that choose over all rows.
        refine: What refines the pruner's masks; None to leave them.
        discounted: Whether, in the alignment, sequence i counts by 2/i, as in the released code's SparseGPT search.
    """

    name: str
    group: int = 128
    refine: Dsnot | None = None
    discounted: bool = False

    @property
    def pruner(self) -> Pruner:
        """The registered pruner."""
        return PRUNERS[self.name]

    @property
    def competing(self) -> int | None:
        """Columns that compete over all rows; None where every row competes alone."""
        return self.group if self.pruner.over_rows else None

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that pruning a block takes."""
        return self.pruner.needs | (dsnot.NEEDS if self.refine else frozenset())


@dataclass(frozen=True)
class BlockSpec:
    """What a program is specialised to: a block's structure, its linears and the method."""

    graph: nnx.GraphDef
    linears: tuple[LinearSpec, ...]
    method: Method


class Weights(NamedTuple):
    """A block's parameters on the device: linears as `W[out, in]`, the rest by Flax path."""

    linears: dict[str, Float[Array, "out in"]]
    rest: dict[str, Array]


Quotas = dict[str, Quota]  # by linear


def _compiled(donate: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Jit with the first argument static, counting traces under the function's name."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = getattr(function, "__name__", "")

        @wraps(function)
        def counted(*args: Any) -> Any:
            trace_counts[name] += 1
            return function(*args)

        return jax.jit(counted, static_argnums=0, donate_argnames=donate)

    return decorate


def module_from(graph: nnx.GraphDef, params: dict[str, Array]) -> Any:
    """A Flax module from its structure and its parameters by dotted path."""
    return nnx.merge(graph, unflatten_dict(params, sep="."))


def _forward(spec: BlockSpec, weights: Weights, hidden: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Inputs]:
    kernels = {f"{name}.kernel": weight.T for name, weight in weights.linears.items()}
    return module_from(spec.graph, {**weights.rest, **kernels})(hidden)


class _Chosen(NamedTuple):
    """A block's pruned weights, its masks (True = kept) and, per input, the damping (see `PrunedBlock`)."""

    weights: Weights
    masks: dict[str, Bool[Array, "out in"]]
    damping: dict[str, Int[Array, ""]]


def _prune(spec: BlockSpec, weights: Weights, statistics: dict[str, Statistics], quotas: Quotas) -> _Chosen:
    """Prunes all linears of a block with the base pruner."""
    pruner = spec.method.pruner
    prepared = {linear.reads: pruner.prepare(statistics.get(linear.reads, Statistics())) for linear in spec.linears}
    kept, masks = {}, {}
    for linear in spec.linears:
        weight = weights.linears[linear.name]
        pruned = pruner.prune(weight, prepared[linear.reads], quotas[linear.name], spec.method.group)
        kept[linear.name], masks[linear.name] = pruned.weight, pruned.mask
    damping = {name: factor.level for name, factor in prepared.items() if isinstance(factor, sparsegpt.Factor)}
    return _Chosen(Weights(kept, weights.rest), masks, damping)


def _refine(spec: BlockSpec, weights: Weights, statistics: dict[str, Statistics], chosen: _Chosen) -> _Chosen:
    """Refines the masks of the attention's linears, if the method says so."""
    settings = spec.method.refine
    if settings is None:
        return chosen
    masks = dict(chosen.masks)
    for linear in spec.linears:
        if not linear.in_mlp:
            name = linear.name
            masks[name] = dsnot.refine(masks[name], weights.linears[name], statistics[linear.reads], settings)
    kept = {name: jnp.where(mask, weights.linears[name], 0) for name, mask in masks.items()}
    return chosen._replace(weights=Weights(kept, weights.rest), masks=masks)


class Aligned(NamedTuple):
    """What one block says about one candidate.

    Attributes:
        hidden: The next block's input; None where no one reads it.
        scores: One for each linear.
        differences: `D - S` of each input.
        damping: As in `PrunedBlock`.
    """

    hidden: Float[Array, "b t d"] | None
    scores: Float[Array, "linear"]
    differences: dict[str, Float[Array, "in"]]
    damping: dict[str, Int[Array, ""]]


def _dense_run(spec: BlockSpec, weights: Weights, hidden: Float[Array, "b t d"]) -> dict[str, Statistics]:
    """What a candidate's pruning and alignment take of every linear input. XLA drops the unused last product."""
    needs = spec.method.pruner.needs | {"squares"}
    inputs = _forward(spec, weights, hidden)[1]
    statistics = collect(inputs, needs)
    if "hessian" in needs:
        statistics = {name: found._replace(hessian=hessian(inputs[name])) for name, found in statistics.items()}
    return statistics


def _pruned_run(
    spec: BlockSpec,
    weights: Weights,
    hidden: Float[Array, "b t d"],
    statistics: dict[str, Statistics],
    quotas: Quotas,
) -> Aligned:
    """Prunes as one candidate says, runs the pruned block and compares."""
    sequences = hidden.shape[0]
    counted = 2 / jnp.arange(1, sequences + 1) if spec.method.discounted else jnp.ones(sequences)

    def pattern(statistics: dict[str, Statistics]) -> dict[str, Float[Array, "in"]]:
        return {name: norms(of_input.squares * counted[:, None]) for name, of_input in statistics.items()}

    dense = pattern(statistics)
    block = _prune(spec, weights, statistics, quotas)
    kept = {name: weight.astype(hidden.dtype) for name, weight in block.weights.linears.items()}
    hidden, inputs = _forward(spec, Weights(kept, weights.rest), hidden)
    pruned = pattern(collect(inputs, {"squares"}))
    scores = jnp.stack([alignment(dense[linear.reads], pruned[linear.reads]) for linear in spec.linears])
    return Aligned(hidden, scores, {name: dense[name] - pruned[name] for name in dense}, block.damping)


def _pruned_runs(spec: BlockSpec, weights: Weights, *candidates: Any, output: bool = True) -> Aligned:
    """`_pruned_run` of all candidates at once, without their differences; without `output`, XLA drops what it takes."""

    def one(*candidate: Any) -> Aligned:
        aligned = _pruned_run(spec, weights, *candidate)._replace(differences={})
        return aligned if output else aligned._replace(hidden=None)

    return _each(one, *candidates)


def _each(function: Callable[..., Any], *candidates: Any) -> Any:
    """`vmap`, but one candidate alone goes without: XLA folds transposes of weights into products, not into batches."""
    if jax.tree.leaves(candidates)[0].shape[0] > 1:
        return jax.vmap(function)(*candidates)
    alone = jax.tree.map(lambda x: x[0], candidates)
    return jax.tree.map(lambda x: x[None], function(*alone))


@_compiled()
def embed(graph: nnx.GraphDef, params: dict[str, Array], tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Tokens to the first block's input."""
    return module_from(graph, params)(tokens)


@_compiled(donate="hidden")
def run(spec: BlockSpec, weights: Weights, hidden: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The block's output."""
    return _forward(spec, weights, hidden)[0]


@_compiled(donate="hessians")
def input_statistics(
    spec: BlockSpec,
    weights: Weights,
    hidden: Float[Array, "b t d"],
    hessians: dict[str, Float[Array, "in in"]],
    first: Int[Array, ""],
    total: Int[Array, ""],
) -> tuple[dict[str, Statistics], dict[str, Float[Array, "in in"]]]:
    """What the method needs of every linear input: per sequence; and Hessians, in which earlier batches are already.

    `first` sequences came before, of `total` ones.
    """
    inputs = _forward(spec, weights, hidden)[1]
    hessians = {name: add_to_hessian(before, inputs[name], first, total) for name, before in hessians.items()}
    return collect(inputs, spec.method.needs), hessians


@_compiled(donate="hidden")
def observe(
    spec: BlockSpec, weights: Weights, hidden: Float[Array, "b t d"]
) -> tuple[Float[Array, "b t d"], dict[str, Float[Array, "b in"]]]:
    """The dense block's output, and the squared sums of every linear input."""
    hidden, inputs = _forward(spec, weights, hidden)
    found = collect(inputs, {"squares"})
    return hidden, {name: of_input.squares for name, of_input in found.items()}


@_compiled()
def outlier_share(
    spec: BlockSpec, weights: Weights, squares: dict[str, Float[Array, "b in"]], multiple: Float[Array, ""]
) -> Float[Array, ""]:
    """OWL's share of a block's Wanda scores, of all linears together, that exceed `multiple` times their mean."""
    scores = [wanda.scores(weights.linears[linear.name], norms(squares[linear.reads])) for linear in spec.linears]
    total = float(sum(x.size for x in scores))
    mean = jnp.sum(jnp.stack([jnp.sum(x) for x in scores])) / total
    return jnp.sum(jnp.stack([jnp.sum(x > multiple * mean) for x in scores])) / total


@jax.jit
def spectrum(weight: Float[Array, "out in"]) -> Float[Array, "rank"]:
    """Eigenvalues of `W^T W`, ascending, without the zeros that the wider side adds: squared singular values, fp32."""
    return jnp.square(jnp.linalg.svd(weight.astype(jnp.float32), compute_uv=False))[::-1]


class PrunedBlock(NamedTuple):
    """A block after pruning.

    Attributes:
        weights: Zeros where the masks prune; the kept weights too may have changed.
        packed: The masks, packed along the input axis, 1 = kept.
        kept_zeros: Number of kept weights that are zero anyway.
        damping: Per input, the index into `sparsegpt.DAMPING` that its Hessian took; empty for other pruners.
    """

    weights: Weights
    packed: dict[str, UInt8[Array, "out bytes"]]
    kept_zeros: dict[str, Int[Array, ""]]
    damping: dict[str, Int[Array, ""]]


@_compiled()
def prune(spec: BlockSpec, weights: Weights, statistics: dict[str, Statistics], quotas: Quotas) -> PrunedBlock:
    """Prunes all linears of a block, with the base pruner and then the refinement."""
    chosen = _refine(spec, weights, statistics, _prune(spec, weights, statistics, quotas))
    packed = {name: jnp.packbits(mask, axis=1) for name, mask in chosen.masks.items()}
    zeros = {name: jnp.sum(mask & (chosen.weights.linears[name] == 0)) for name, mask in chosen.masks.items()}
    return PrunedBlock(chosen.weights, packed, zeros, chosen.damping)


@_compiled()
def apply_masks(linears: tuple[str, ...], weights: Weights, packed: dict[str, UInt8[Array, "out bytes"]]) -> Weights:
    """Zeros what packed masks prune."""

    def masked(name: str) -> Float[Array, "out in"]:
        weight = weights.linears[name]
        return jnp.where(jnp.unpackbits(packed[name], axis=1, count=weight.shape[1]), weight, 0)

    return Weights({name: masked(name) for name in linears}, weights.rest)


@_compiled()
def dense_run(spec: BlockSpec, weights: Weights, hidden: Float[Array, "b t d"]) -> dict[str, Statistics]:
    """Statistics of the dense block: of one candidate, or of all where nothing is pruned before it."""
    return _dense_run(spec, weights, hidden)


@_compiled()
def dense_runs(spec: BlockSpec, weights: Weights, hidden: Float[Array, "c b t d"]) -> dict[str, Statistics]:
    """Statistics of the dense block behind every candidate's pruned blocks, `[candidate, ...]`."""
    return _each(lambda hidden: _dense_run(spec, weights, hidden), hidden)


@_compiled(donate="hidden")
def search(
    spec: BlockSpec,
    weights: Weights,
    hidden: Float[Array, "c b t d"],
    statistics: dict[str, Statistics],
    quotas: Quotas,
) -> Aligned:
    """All candidates at once; `differences` are left out."""
    return _pruned_runs(spec, weights, hidden, statistics, quotas)


@_compiled()
def search_last(
    spec: BlockSpec,
    weights: Weights,
    hidden: Float[Array, "c b t d"],
    statistics: dict[str, Statistics],
    quotas: Quotas,
) -> Aligned:
    """`search` in the last block, whose output no one reads."""
    return _pruned_runs(spec, weights, hidden, statistics, quotas, output=False)


@_compiled(donate="hidden")
def align(
    spec: BlockSpec,
    weights: Weights,
    hidden: Float[Array, "b t d"],
    statistics: dict[str, Statistics],
    quotas: Quotas,
) -> Aligned:
    """One candidate, with the differences that the row step needs."""
    return _pruned_run(spec, weights, hidden, statistics, quotas)


@_compiled()
def window_losses(
    graph: nnx.GraphDef, params: dict[str, Array], hidden: Float[Array, "b t d"], tokens: Int[Array, "b t"]
) -> Float[Array, "b"]:
    """Mean next-token loss of each window, in nats; logits exist for one window at a time."""
    head = module_from(graph, params)

    def one(window: tuple[Array, Array]) -> Array:
        hidden, tokens = window
        logits = head(hidden[:-1]).astype(jnp.float32)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]))

    return jax.lax.map(one, (hidden, tokens))
