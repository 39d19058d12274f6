"""What a model's head says of every token, streamed through slices of the vocabulary: dense, and of candidates."""

import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neuroal_jax.data.tokens import token_hash
from neuroal_jax.errors import UserError
from neuroal_jax.masks.budget import prunable_weights
from neuroal_jax.numerics.kl import Dense
from neuroal_jax.walk import head_programs, programs
from neuroal_jax.walk.blocks import Advance, Blocks, ignore
from neuroal_jax.walk.head_programs import NextTokens


def dense_distributions(blocks: Blocks, windows: np.ndarray, advance: Advance = ignore) -> Dense:
    """What is kept of the dense model's next-token distributions on windows `[n, tokens]`.

    Args:
        blocks: The model.
        windows: Token ids.
        advance: Told of weights, see `walk.perplexity.work`.

    Raises:
        UserError: If a distribution is not finite.
    """
    of_block = prunable_weights(blocks.checkpoint.linear_shapes(), 1)
    about = {"tokens": token_hash(windows)}
    steps = blocks.begin("dense-distributions", lambda done: advance(done * of_block), about)
    if steps.first > blocks.last:
        advance(math.prod(blocks.checkpoint.head_shape()))
        return _dense(steps.outputs[blocks.last])
    hidden = steps.hidden(lambda: blocks.embed([windows]))
    for block, weights in blocks.read(steps.first):
        hidden = [jax.block_until_ready(programs.run(blocks.spec, weights, hidden[0]))]
        if block < blocks.last:
            steps.record(block, hidden)
        advance(of_block)
    dense = distributions(blocks, hidden[0], advance)
    steps.record(blocks.last, [], {name: np.asarray(x) for name, x in dense._asdict().items() if x is not None})
    return dense


def distributions(blocks: Blocks, hidden: Float[Array, "b t d"], advance: Advance = ignore) -> Dense:
    """What is kept of the distributions that follow from the last block's output; `advance` is told of every slice.

    Raises:
        UserError: If a distribution is not finite.
    """
    features = _features(blocks, hidden[None])[0]
    found = None
    for _, params in blocks.head_slices():
        found = jax.block_until_ready(head_programs.add_dense(blocks.head, params, features, found))
        advance(params["embedding"].size)
    dense: Dense = head_programs.finish_dense(found, features)
    if not np.isfinite(dense.entropy).all():
        raise UserError(f"the dense model's distributions are not finite in {blocks.dtype}: try --dtype float32")
    return dense


def scores(
    blocks: Blocks,
    objective: ModuleType,
    dense: Dense | None,
    windows: np.ndarray,
    hidden: list[Any],
    advance: Advance = ignore,
) -> np.ndarray:
    """Scores `[candidate, window]`, float64, of all candidates in groups; each slice of the head is read once.

    Args:
        blocks: The model.
        objective: Code of an objective that reads the head.
        dense: See `dense_distributions`, where the objective compares with it.
        windows: Token ids `[n, tokens]`.
        hidden: The last block's output of each group, `[candidate, window, token, hidden]`; emptied.
        advance: Told the weights of every slice, after it.

    Raises:
        UserError: If a score is not finite.
    """
    devices, groups = blocks.devices, len(hidden)
    placed = devices.spread(hidden)
    hidden.clear()
    of_dense = devices.copies(dense, groups)

    def begin(group: int) -> tuple[Array, NextTokens]:
        features = _features(blocks, placed[group])
        placed[group] = None
        return features, head_programs.begin_candidates(objective, features, of_dense[devices.turn(group)])

    features, found = map(list, zip(*devices.each(groups, begin), strict=True))
    for first, params in blocks.head_slices():
        of_device = devices.copies(params, groups)
        found = _add_candidates(blocks, objective, of_device, first, features, windows, of_dense, found)
        jax.block_until_ready(found)
        advance(params["embedding"].size)
    finished = devices.each(
        groups,
        lambda group: np.asarray(
            head_programs.finish_candidates(objective, found[group], of_dense[devices.turn(group)])
        ),
    )
    result = np.concatenate(finished).astype(np.float64)
    if not np.isfinite(result).all():
        raise UserError(f"scores of candidates are not finite in {blocks.dtype}: try --dtype float32")
    return result


def _add_candidates(
    blocks: Blocks,
    objective: ModuleType,
    params: list[dict[str, Array]],
    first: int,
    features: list[Array],
    windows: np.ndarray,
    dense: list[Dense | None],
    before: list[NextTokens],
) -> list[NextTokens]:
    """Takes in the logits of a slice of the vocabulary; `params` and `dense` are copies on the devices."""

    def of_group(group: int) -> NextTokens:
        turn = blocks.devices.turn(group)
        found: NextTokens = head_programs.add_candidates(
            blocks.head, objective, params[turn], features[group], windows, dense[turn], first, before[group]
        )
        return found

    return blocks.devices.each(len(features), of_group)


def _features(blocks: Blocks, hidden: Array) -> Array:
    """What the head multiplies the vectors of all tokens with, of `[candidate, window, token, hidden]`."""
    any_token = blocks.put(blocks.checkpoint.read_part("head", np.arange(1)))
    return head_programs.features(blocks.head, any_token, hidden)


def _dense(output: dict[str, np.ndarray]) -> Dense:
    """On the device again, of what is kept of it on the host."""
    arrays: dict[str, Any] = {name: jnp.asarray(output[name]) if name in output else None for name in Dense._fields}
    return Dense(**arrays)
