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

from neuroal_jax.allocation.neuroal.alignment import alignment
from neuroal_jax.models.family import LinearSpec
from neuroal_jax.pruners import PRUNERS
from neuroal_jax.selection import select_smallest
from neuroal_jax.statistics import Inputs, norms, squared_sums

trace_counts: Counter[str] = Counter()


@dataclass(frozen=True)
class BlockSpec:
    """What a program is specialised to: a block's structure, its linears and the pruner."""

    graph: nnx.GraphDef
    linears: tuple[LinearSpec, ...]
    pruner: str


class Weights(NamedTuple):
    """A block's parameters on the device: linears as `W[out, in]`, the rest by Flax path."""

    linears: dict[str, Float[Array, "out in"]]
    rest: dict[str, Array]


class DeviceCounts(NamedTuple):
    """`budget.RowCounts` on the device; both may have a leading candidate axis."""

    pruned: Int[Array, "*candidate out"]
    ties_high: Bool[Array, "*candidate"]


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


def _prune(
    spec: BlockSpec, weights: Weights, norms: dict[str, Float[Array, "in"]], counts: dict[str, DeviceCounts]
) -> tuple[Weights, dict[str, Bool[Array, "out in"]]]:
    """Prunes all linears of a block; returns the pruned weights and the masks (1 = kept)."""
    pruner = PRUNERS[spec.pruner]
    kept, masks = {}, {}
    for linear in spec.linears:
        weight = weights.linears[linear.name]
        scores = pruner.scores(weight, norms.get(linear.reads, jnp.zeros(weight.shape[1])))
        mask = ~select_smallest(scores, counts[linear.name].pruned, counts[linear.name].ties_high)
        masks[linear.name] = mask
        kept[linear.name] = jnp.where(mask, weight, 0)
    return Weights(kept, weights.rest), masks


class Aligned(NamedTuple):
    """What one block says about one candidate: next hidden states, score per linear, `D - S` per input."""

    hidden: Float[Array, "b t d"]
    scores: Float[Array, "linear"]
    differences: dict[str, Float[Array, "in"]]


def _candidate(
    spec: BlockSpec, weights: Weights, hidden: Float[Array, "b t d"], counts: dict[str, DeviceCounts]
) -> Aligned:
    """Dense run, pruning and pruned run of one candidate. XLA drops the dense run's unused last product."""
    _, inputs = _forward(spec, weights, hidden)
    dense = norms(squared_sums(inputs))
    pruned_weights, _ = _prune(spec, weights, dense, counts)
    hidden, inputs = _forward(spec, pruned_weights, hidden)
    pruned = norms(squared_sums(inputs))
    scores = jnp.stack([alignment(dense[linear.reads], pruned[linear.reads]) for linear in spec.linears])
    return Aligned(hidden, scores, {name: dense[name] - pruned[name] for name in dense})


@_compiled()
def embed(graph: nnx.GraphDef, params: dict[str, Array], tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Tokens to the first block's input."""
    return module_from(graph, params)(tokens)


@_compiled(donate="hidden")
def run(spec: BlockSpec, weights: Weights, hidden: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The block's output."""
    return _forward(spec, weights, hidden)[0]


@_compiled()
def input_sums(spec: BlockSpec, weights: Weights, hidden: Float[Array, "b t d"]) -> dict[str, Float[Array, "b in"]]:
    """Squared sums of every linear input, per sequence."""
    return squared_sums(_forward(spec, weights, hidden)[1])


@_compiled()
def prune(
    spec: BlockSpec, weights: Weights, sums: dict[str, Float[Array, "b in"]], counts: dict[str, DeviceCounts]
) -> tuple[Weights, dict[str, UInt8[Array, "out bytes"]], dict[str, Int[Array, ""]]]:
    """Pruned weights, masks packed along the input axis, and the number of kept weights that are zero anyway."""
    pruned, masks = _prune(spec, weights, norms(sums), counts)
    packed = {name: jnp.packbits(mask, axis=1) for name, mask in masks.items()}
    zeros = {name: jnp.sum(mask & (weights.linears[name] == 0)) for name, mask in masks.items()}
    return pruned, packed, zeros


@_compiled()
def apply_masks(linears: tuple[str, ...], weights: Weights, packed: dict[str, UInt8[Array, "out bytes"]]) -> Weights:
    """Zeros what packed masks prune."""

    def masked(name: str) -> Float[Array, "out in"]:
        weight = weights.linears[name]
        return jnp.where(jnp.unpackbits(packed[name], axis=1, count=weight.shape[1]), weight, 0)

    return Weights({name: masked(name) for name in linears}, weights.rest)


@_compiled(donate="hidden")
def search(
    spec: BlockSpec, weights: Weights, hidden: Float[Array, "c b t d"], counts: dict[str, DeviceCounts]
) -> tuple[Float[Array, "c b t d"], Float[Array, "c linear"]]:
    """All candidates at once: next hidden states and the score of each linear."""
    aligned = jax.vmap(lambda hidden, counts: _candidate(spec, weights, hidden, counts))(hidden, counts)
    return aligned.hidden, aligned.scores


@_compiled(donate="hidden")
def align(spec: BlockSpec, weights: Weights, hidden: Float[Array, "b t d"], counts: dict[str, DeviceCounts]) -> Aligned:
    """One candidate, with the differences that the row step needs."""
    return _candidate(spec, weights, hidden, counts)


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
