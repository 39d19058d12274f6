"""Scoring candidates with the refinement in the loop: each is pruned and updated as the final model would be."""

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from neuroal_jax.allocation.problem import Scores
from neuroal_jax.data.tokens import token_hash
from neuroal_jax.masks.budget import prunable_weights
from neuroal_jax.numerics.kl import Dense
from neuroal_jax.numerics.selection import Counts
from neuroal_jax.walk import head, programs
from neuroal_jax.walk.blocks import Advance, Batches, Blocks, ignore
from neuroal_jax.walk.final import prune_block
from neuroal_jax.walk.method import Method
from neuroal_jax.walk.programs import Weights
from neuroal_jax.walk.search import about_scores


def score(
    blocks: Blocks,
    method: Method,
    objective: ModuleType,
    dense: Dense | None,
    fitted: np.ndarray,
    windows: np.ndarray,
    candidates: Sequence[Counts],
    advance: Advance = ignore,
) -> Scores:
    """Scores of every sequence (fp32 values as float64), by an objective that reads the head.

    What weights are fitted to they follow more closely than anything else, so candidates are pruned and fitted on some
    sequences and scored on others. They go through a block one after the other, as each one's statistics are its own.

    Args:
        blocks: The model.
        method: How weights are chosen and updated; see `Method.of_candidates`.
        objective: Code of the objective, see `search/objective.py`.
        dense: The dense model's distributions on the windows, where the objective compares with them.
        fitted: Token ids `[m, tokens]` that candidates are pruned and fitted on.
        windows: Token ids `[n, tokens]`: the search set.
        candidates: How many weights go in every set of competitors, for each candidate.
        advance: Told of weights, for each candidate as many as `walk.perplexity.work` says.

    Raises:
        UserError: If activations, factors, updated weights or scores are not finite.
    """
    method = method.of_candidates
    of_block = prunable_weights(blocks.checkpoint.linear_shapes(), 1)
    about = {**about_scores(method, objective.__name__, windows, candidates), "fitted on": token_hash(fitted)}
    steps = blocks.begin("search", lambda done: advance(done * len(candidates) * of_block), about)
    if steps.first > blocks.last:
        advance(len(candidates) * math.prod(blocks.checkpoint.head_shape()))
        return Scores(of_sequences=np.asarray(steps.outputs[blocks.last]["scores"]))
    batches = blocks.batches(fitted)
    beside = len(batches) if method.reads_dense_model else 0

    def start() -> Batches:
        hidden = blocks.embed([*batches, windows])
        return [*map(jnp.copy, hidden[:beside]), *hidden]

    def put(array: np.ndarray, number: int) -> jax.Array:
        return blocks.devices.put(array, max(number - beside, 0) // (len(batches) + 1))

    # What candidates are fitted on, in the dense model, where that walks along; then of each candidate the batches that
    # it is fitted on, and the search set: before the first block, one for all.
    states: Batches = steps.hidden(start, put)
    of_dense, flat = states[:beside], states[beside:]
    del states  # each is free once its block has run
    for block, weights in blocks.read(steps.first):
        entering = [flat] * len(candidates) if block == 0 else _by_candidate(flat, len(candidates))
        flat = _through_block(
            blocks, method, block, weights, of_dense, entering, len(fitted), candidates, lambda: advance(of_block)
        )
        if block < blocks.last:
            of_dense = [programs.run(blocks.spec, weights, h) for h in of_dense]
            steps.record(block, [*of_dense, *flat])
        advance(0)  # in this thread, where a listener is told of what others did
    outputs = [scored[None] for scored in flat]
    scores = head.scores(blocks, objective, dense, windows, outputs, lambda size: advance(len(candidates) * size))
    steps.record(blocks.last, [], {"scores": scores})
    return Scores(of_sequences=scores)


def _through_block(
    blocks: Blocks,
    method: Method,
    block: int,
    weights: Weights,
    of_dense: Batches,
    entering: Sequence[Batches],
    sequences: int,
    candidates: Sequence[Counts],
    done: Callable[[], object],
) -> Batches:
    """The next block's input of every candidate, one after the other; behind the last block only the search set's.

    Args:
        blocks: The model; candidates are divided over devices.
        method: How weights are chosen and updated.
        block: Number of the block.
        weights: Its dense weights.
        of_dense: Its input in the dense model, of what candidates are fitted on.
        entering: Its input for every candidate: batches that it is fitted on, and the search set.
        sequences: How many sequences the former are.
        candidates: How many weights go.
        done: Called after every candidate.
    """
    devices = blocks.devices
    weights_on = devices.copies(weights, len(candidates))
    dense_on = devices.copies(of_dense, len(candidates))

    def of_candidate(number: int) -> Batches:
        turn = devices.turn(number)
        hidden = devices.place(entering[number], number)
        *fit, scored = [jnp.copy(h) for h in hidden] if block == 0 else hidden
        dense, counts = weights_on[turn], candidates[number][block]
        pruned, _ = prune_block(blocks.on(number), method, block, dense, fit, dense_on[turn], sequences, counts)
        kept = {name: weight.astype(blocks.dtype) for name, weight in pruned.weights.linears.items()}
        onward = [scored] if block == blocks.last else [*fit, scored]
        found = [programs.run(blocks.spec, Weights(kept, dense.rest), h) for h in onward]
        jax.block_until_ready(found)
        done()
        return found

    return [h for found in devices.each(len(candidates), of_candidate) for h in found]


def _by_candidate(flat: Batches, candidates: int) -> list[Batches]:
    each = len(flat) // candidates
    return [flat[first : first + each] for first in range(0, len(flat), each)]
