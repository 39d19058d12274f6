"""Pruning the model: each block on statistics of the pruned blocks before it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from neuroal_jax.checkpoint.tensors import FLOAT_DTYPES, is_finite, is_zero
from neuroal_jax.errors import UserError
from neuroal_jax.numerics.cholesky import DAMPING
from neuroal_jax.numerics.selection import Counts, Quotas
from neuroal_jax.walk import programs
from neuroal_jax.walk.blocks import Advance, Batches, Blocks, ignore
from neuroal_jax.walk.method import Method
from neuroal_jax.walk.observed import collect
from neuroal_jax.walk.programs import PrunedBlock, Weights
from neuroal_jax.walk.update import update

# Given a block's number and its updated weights, gives what stands for them in the result: in files, for example.
MoveUpdated = Callable[[int, dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class BlockResult:
    """What pruning one block gives, by linear.

    Attributes:
        packed: Masks, uint8 `[out, ceil(in / 8)]`, 1 = kept.
        kept_zeros: Number of kept weights that are written as zeros all the same.
        updated: The weights in the checkpoint's dtype, where the pruner changed kept ones too; else empty.
        damping: What the Hessian of each linear's input was damped with, where there is one.
        refits: How far each linear's output is from the dense one, where the refinement updates weights: see `update`.
    """

    packed: dict[str, np.ndarray]
    kept_zeros: dict[str, int]
    updated: dict[str, np.ndarray]
    damping: dict[str, float]
    refits: dict[str, dict[str, float]] = field(default_factory=dict)


def prune(
    blocks: Blocks,
    method: Method,
    windows: np.ndarray,
    counts: Counts,
    advance: Advance = ignore,
    move_updated: MoveUpdated = lambda block, updated: updated,
    zeros: Sequence[Mapping[str, np.ndarray]] = (),
) -> list[BlockResult]:
    """Prunes block by block, each on statistics of the pruned blocks before it.

    Args:
        blocks: The model.
        method: How weights are chosen.
        windows: Token ids `[n, tokens]`: the calibration set.
        counts: How many weights go in every set of competitors.
        advance: Told 1 after every block.
        move_updated: What to do with the updated weights of every block.
        zeros: Where the checkpoint is zero, see `Checkpoint.zeros`.

    Raises:
        UserError: If activations, factors or updated weights are not finite.
    """
    steps, devices = blocks.begin("pruning", advance), blocks.devices
    batches = blocks.batches(windows) if method.reads_activations else []

    def start() -> Batches:
        hidden = devices.spread(blocks.embed(batches)) if batches else []
        return [*hidden, *(map(jnp.copy, hidden) if method.reads_dense_model else ())]

    states: Batches = steps.hidden(start, lambda array, number: devices.put(array, number % len(batches)))
    hidden, of_dense = states[: len(batches)], states[len(batches) :]
    del states  # each is free once its block has run
    results = [_stored(output, block, move_updated) for block, output in enumerate(steps.outputs)]
    for block, weights in blocks.read(steps.first):
        pruned, refits = prune_block(blocks, method, block, weights, hidden, of_dense, len(windows), counts[block])
        result = replace(_result(blocks, method, block, pruned, zeros[block] if zeros else {}), refits=refits)
        if method.updates_weights:
            pruned = pruned._replace(weights=Weights(blocks.put(result.updated), weights.rest))
            result = replace(result, updated=move_updated(block, result.updated))
        results.append(result)
        if block < blocks.last:  # no one reads the last block's output
            hidden = blocks.run(devices.copies(pruned.weights, len(hidden)), hidden)
            of_dense = blocks.run(devices.copies(weights, len(of_dense)), of_dense)
        steps.record(block, [*hidden, *of_dense], vars(result))
        advance(1)
    return results


def prune_block(
    blocks: Blocks,
    method: Method,
    block: int,
    weights: Weights,
    hidden: Batches,
    of_dense: Batches,
    sequences: int,
    quotas: Quotas,
) -> tuple[PrunedBlock, dict[str, dict[str, float]]]:
    """A block, pruned and refined on the first `sequences` sequences of its input, and how far `update` brought it.

    Args:
        blocks: The model.
        method: How weights are chosen and updated.
        block: Number of the block.
        weights: Its dense weights.
        hidden: Its input behind the pruned blocks, in batches, each on its device.
        of_dense: Its input in the dense model, for methods by which that walks along; likewise.
        sequences: How many sequences count.
        quotas: How many weights go.

    Raises:
        UserError: If activations, factors or updated weights are not finite.
    """
    copies = blocks.devices.copies(weights, len(hidden))
    statistics = collect(blocks, method.of_masks.needs, block, copies, hidden, sequences)
    pruned = programs.prune(blocks.spec, method.of_masks, weights, statistics, quotas)
    blocks.check_damping(block, pruned.damping)
    if method.update is None:
        return pruned, {}
    here = blocks.devices.gathered
    return update(blocks, method.update, block, weights, pruned, here(hidden), here(of_dense), sequences)


def _result(
    blocks: Blocks, method: Method, block: int, pruned: PrunedBlock, zeros: Mapping[str, np.ndarray]
) -> BlockResult:
    """Moves a pruned block to the host; updated weights in the dtype in which they will be stored."""
    packed = {name: np.asarray(bits) for name, bits in pruned.packed.items()}
    kept_zeros = {
        name: int(np.bitwise_count(bits & zeros[name]).sum()) if zeros else 0 for name, bits in packed.items()
    }
    damping = {
        linear.name: DAMPING[int(pruned.damping[linear.reads])]
        for linear in blocks.spec.linears
        if linear.reads in pruned.damping
    }
    if not method.updates_weights:
        return BlockResult(packed, kept_zeros, {}, damping)
    updated = {}
    for name, weight in pruned.weights.linears.items():
        dense = np.asarray(weight)
        updated[name] = _as_stored(blocks, blocks.checkpoint.linear_name(block, name), dense)
        kept = np.unpackbits(packed[name], axis=1, count=dense.shape[1]).astype(bool)
        if not method.settings.reference and method.pattern.steps is None:  # a group may keep zeros of the checkpoint
            _keep_nonzero(updated[name], kept, dense)
        kept_zeros[name] = int(np.count_nonzero(kept & is_zero(updated[name])))
    return BlockResult(packed, kept_zeros, updated, damping)


def _keep_nonzero(stored: np.ndarray, kept: np.ndarray, exact: np.ndarray) -> None:
    """Stores what is kept and would be rounded to zero as the smallest number that is none, so that the budget holds.

    In fp32 and bfloat16 that is the smallest normal one: processors may take those below for zero.
    """
    lost = kept & is_zero(stored)
    if lost.any():
        limits = ml_dtypes.finfo(stored.dtype)
        least = limits.smallest_subnormal if stored.dtype == np.float16 else limits.smallest_normal
        stored[lost] = np.copysign(np.float32(least), exact[lost])


def _as_stored(blocks: Blocks, tensor: str, weight: np.ndarray) -> np.ndarray:
    """A weight in the checkpoint's dtype for a tensor; raises UserError where that cannot hold it."""
    stored = FLOAT_DTYPES[blocks.checkpoint.source.infos[tensor].dtype]
    with np.errstate(over="ignore"):
        found = weight.astype(stored)
    if not is_finite(found):
        raise UserError(
            f"tensor {tensor}: the updated weights are not finite in {stored.name}, the checkpoint's dtype: "
            "convert the checkpoint to float32, or use another --pruner or --refine"
        )
    return found


def _stored(output: dict[str, Any], block: int, move_updated: MoveUpdated) -> BlockResult:
    """A block's result that an interrupted run stored."""
    return BlockResult(
        packed=output["packed"],
        kept_zeros={name: int(n) for name, n in output["kept_zeros"].items()},
        updated=move_updated(block, output["updated"]),
        damping={name: float(value) for name, value in output["damping"].items()},
        refits={
            name: {kind: value.item() for kind, value in found.items()} for name, found in output["refits"].items()
        },
    )
