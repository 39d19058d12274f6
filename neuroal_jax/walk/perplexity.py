"""Token perplexity, of the dense model or of one that is pruned on the fly."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array

from neuroal_jax.checkpoint.opened import Checkpoint
from neuroal_jax.data.tokens import token_hash
from neuroal_jax.errors import UserError
from neuroal_jax.masks.budget import prunable_weights
from neuroal_jax.walk import head_programs, programs
from neuroal_jax.walk.blocks import Advance, Batches, Blocks, evaluation_batches, ignore
from neuroal_jax.walk.final import BlockResult
from neuroal_jax.walk.head_programs import NextTokens
from neuroal_jax.walk.programs import Weights


def perplexity(
    blocks: Blocks, windows: np.ndarray, results: Sequence[BlockResult] | None = None, advance: Advance = ignore
) -> float:
    """Token perplexity: `exp(mean over windows of mean next-token loss)`, each window on its own.

    Args:
        blocks: The model.
        windows: Token ids `[n, tokens]`.
        results: What to prune with on the fly; None for the dense model.
        advance: Told the weights of every block, and of every slice of the head, after it; see `work`.

    Raises:
        UserError: If the loss is not finite, naming the block and the linear where it began.
            (A finite loss of 710 nats or more has a perplexity beyond a float's range: infinity.)
    """
    model = "dense" if results is None else "pruned"
    of_block = prunable_weights(blocks.checkpoint.linear_shapes(), 1)
    about = {"tokens": token_hash(windows)} if results is None else None
    steps = blocks.begin(f"{model}-perplexity", lambda done: advance(done * of_block), about)
    if steps.first > blocks.last:
        advance(math.prod(blocks.checkpoint.head_shape()))
        return float(steps.outputs[blocks.last]["perplexity"])
    batches = evaluation_batches(windows)
    devices = blocks.devices
    hidden = steps.hidden(lambda: devices.spread(blocks.embed(batches)), devices.put)
    for block, weights in blocks.read(steps.first):
        weights = _pruned(blocks, weights, results[block]) if results else weights
        hidden = blocks.run(devices.copies(weights, len(hidden)), hidden)
        jax.block_until_ready(hidden)
        if block < blocks.last:
            steps.record(block, hidden)
        advance(of_block)
    loss = float(_losses(blocks, hidden, batches, advance).mean(dtype=np.float64))
    if not np.isfinite(loss):
        _find_overflow(blocks, batches, results)
        raise UserError(f"the {model} model's loss is {loss} in {blocks.dtype}: try --dtype float32")
    with np.errstate(over="ignore"):
        found = float(np.exp(loss))
    steps.record(blocks.last, [], {"perplexity": np.float64(found)})
    return found


def work(checkpoint: Checkpoint) -> int:
    """What `perplexity` tells `advance` in all: the weights that every token is multiplied by."""
    return prunable_weights(checkpoint.linear_shapes(), checkpoint.num_blocks) + math.prod(checkpoint.head_shape())


def _losses(blocks: Blocks, hidden: Batches, batches: list[np.ndarray], advance: Advance) -> np.ndarray:
    """Mean next-token loss of every window, from the last block's outputs."""
    devices = blocks.devices
    found = devices.spread([head_programs.no_next_tokens(batch) for batch in batches])
    for first, params in blocks.head_slices():
        found = _add_logits(blocks, devices.copies(params, len(batches)), first, hidden, batches, found)
        jax.block_until_ready(found)
        advance(params["embedding"].size)
    return np.concatenate([np.asarray(head_programs.window_losses(of_batch)) for of_batch in found])


def _add_logits(
    blocks: Blocks,
    params: list[dict[str, Array]],
    first: int,
    hidden: Batches,
    batches: list[np.ndarray],
    before: list[NextTokens],
) -> list[NextTokens]:
    """Takes in the logits of a slice of the vocabulary, of which `params` are copies on the devices."""

    def of_batch(number: int) -> NextTokens:
        mine = params[blocks.devices.turn(number)]
        found: NextTokens = head_programs.add_logits(
            blocks.head, mine, hidden[number], batches[number], first, before[number]
        )
        return found

    return blocks.devices.each(len(batches), of_batch)


def _pruned(blocks: Blocks, weights: Weights, result: BlockResult) -> Weights:
    if result.updated:
        return Weights(blocks.put(result.updated), weights.rest)
    return programs.apply_masks(weights, result.packed)


def _find_overflow(blocks: Blocks, batches: list[np.ndarray], results: Sequence[BlockResult] | None) -> None:
    """Walks again, to raise UserError for the first block and linear whose input is not finite."""
    hidden = blocks.embed(batches)
    for block, weights in blocks.read():
        weights = _pruned(blocks, weights, results[block]) if results else weights
        for index, h in enumerate(hidden):
            empty = blocks.new_statistics(("squares",), len(h))
            hidden[index], found = programs.observe(blocks.spec, weights, h, empty, 0, len(h))
            blocks.finished_statistics(block, found, len(h))
