"""Measuring every block of the dense model, for allocations that look before they decide."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neuroal_jax.allocation.problem import Measurement
from neuroal_jax.data.tokens import token_hash
from neuroal_jax.numerics.statistics import Statistics
from neuroal_jax.walk.blocks import Advance, Batches, Blocks, ignore
from neuroal_jax.walk.observed import observe


def measure(
    blocks: Blocks,
    label: str,
    windows: np.ndarray,
    needs: Sequence[str],
    of_block: Measurement,
    advance: Advance = ignore,
    settings: Mapping[str, Any] | None = None,
) -> list[Any]:
    """What `of_block(linears, statistics)` gives for every block of the dense model, in order.

    Args:
        blocks: The model.
        label: The walk's name in messages and in the state for --resume.
        windows: Token ids `[n, tokens]`: the calibration set.
        needs: Statistics of every input; without any, no activations are computed.
        of_block: Given a block's linears `W[out, in]` and, by linear, the statistics of its input.
        advance: Told 1 after every block.
        settings: See `allocation.problem.Model.measure`.

    Raises:
        UserError: If activations are not finite.
    """
    seen = {"tokens": token_hash(windows), "batch": blocks.batch} if needs else {}
    about = {**seen, "needs": list(needs), "settings": settings}
    steps = blocks.begin(label, advance, None if settings is None else about)
    devices = blocks.devices
    hidden: Batches = steps.hidden(
        lambda: devices.spread(blocks.embed(blocks.batches(windows))) if needs else [], devices.put
    )
    found = [_plain(output["found"]) for output in steps.outputs]
    for block, weights in blocks.read(steps.first):
        statistics: dict[str, Statistics] = {}
        if needs:
            copies = devices.copies(weights, len(hidden))
            hidden, statistics = observe(blocks, needs, block, copies, hidden, len(windows))
        linears = {linear.name: weights.linears[linear.name] for linear in blocks.spec.linears}
        by_linear = {linear.name: statistics.get(linear.reads, {}) for linear in blocks.spec.linears}
        found.append(of_block(linears, by_linear))
        steps.record(block, hidden, {"found": found[-1]})
        advance(1)
    return found


def _plain(stored: Any) -> Any:
    """A number again, where a number was stored as an array."""
    return stored.item() if isinstance(stored, np.ndarray) and stored.ndim == 0 else stored
