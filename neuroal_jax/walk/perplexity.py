"""Token perplexity, of the dense model or of one that is pruned on the fly."""

from collections.abc import Sequence

import jax
import numpy as np

from neuroal_jax.data.tokens import token_hash
from neuroal_jax.errors import UserError
from neuroal_jax.walk import programs
from neuroal_jax.walk.blocks import Advance, Blocks, ignore
from neuroal_jax.walk.final import BlockResult
from neuroal_jax.walk.programs import Weights


def perplexity(
    blocks: Blocks, windows: np.ndarray, results: Sequence[BlockResult] | None = None, advance: Advance = ignore
) -> float:
    """Token perplexity: `exp(mean over windows of mean next-token loss)`, each window on its own.

    Args:
        blocks: The model.
        windows: Token ids `[n, tokens]`.
        results: What to prune with on the fly; None for the dense model.
        advance: Told 1 after every block.

    Raises:
        UserError: If the loss is not finite, naming the block and the linear where it began.
            (A finite loss of 710 nats or more has a perplexity beyond a float's range: infinity.)
    """
    model = "dense" if results is None else "pruned"
    steps = blocks.begin(f"{model}-perplexity", advance, {"tokens": token_hash(windows)} if results is None else None)
    if steps.first > blocks.last:
        return float(steps.outputs[blocks.last]["perplexity"])
    batches = blocks.batches(windows)
    hidden = steps.hidden(lambda: blocks.embed(batches))
    for block, weights in blocks.read(steps.first):
        weights = _pruned(blocks, weights, results[block]) if results else weights
        hidden = [programs.run(blocks.spec, weights, h) for h in hidden]
        jax.block_until_ready(hidden)
        if block < blocks.last:
            steps.record(block, hidden)
        advance(1)
    loss = float(blocks.losses(hidden, batches)[: len(windows)].mean(dtype=np.float64))
    if not np.isfinite(loss):
        _find_overflow(blocks, batches, results)
        raise UserError(f"the {model} model's loss is {loss} in {blocks.dtype}: try --dtype float32")
    with np.errstate(over="ignore"):
        found = float(np.exp(loss))
    steps.record(blocks.last, [], {"perplexity": np.float64(found)})
    return found


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
            empty = blocks.new_statistics(("squares",), blocks.batch)
            hidden[index], found = programs.observe(blocks.spec, weights, h, empty, 0, blocks.batch)
            blocks.finished_statistics(block, found, blocks.batch)
