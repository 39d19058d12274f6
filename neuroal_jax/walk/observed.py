"""Statistics of the inputs of a block's linears, over batches of sequences that may be on several devices."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from neuroal_jax.numerics.statistics import SUMS, Statistics
from neuroal_jax.walk import programs
from neuroal_jax.walk.blocks import Batches, Blocks
from neuroal_jax.walk.programs import State, Weights


def collect(
    blocks: Blocks, needs: Sequence[str], block: int, weights: Sequence[Weights], hidden: Batches, sequences: int
) -> dict[str, Statistics]:
    """Statistics of every input of a block, on the first device.

    Args:
        blocks: The model.
        needs: Which.
        block: Number of the block.
        weights: Its weights on every device, see `Devices.copies`.
        hidden: Its input in batches, each on its device.
        sequences: How many sequences of these count.

    Raises:
        UserError: If a sum is not finite.
    """
    if not needs:
        return {}
    sums = tuple(name for name in needs if name in SUMS and len(weights) > 1)
    others = tuple(name for name in needs if name not in sums)
    of_sums = _by_input(blocks, sums, weights, hidden, sequences) if sums else {}
    of_others = _by_sequence(blocks, others, weights, hidden, sequences) if others else {}
    state = {name: {**of_sums.get(name, {}), **of_others.get(name, {})} for name in {**of_sums, **of_others}}
    return blocks.finished_statistics(block, state, sequences)


def observe(
    blocks: Blocks, needs: Sequence[str], block: int, weights: Sequence[Weights], hidden: Batches, sequences: int
) -> tuple[Batches, dict[str, Statistics]]:
    """The block's output, and `collect`; on one device in one run of the block."""
    if len(weights) > 1 and any(name in SUMS for name in needs):
        statistics = collect(blocks, needs, block, weights, hidden, sequences)
        return blocks.run(weights, hidden), statistics
    states = _new_states(blocks, tuple(needs), weights, sequences)

    def take_in(number: int) -> Array:
        turn, first = blocks.devices.turn(number), number * blocks.batch
        output, states[turn] = programs.observe(
            blocks.spec, weights[turn], hidden[number], states[turn], first, sequences
        )
        return output

    onward = blocks.devices.each(len(hidden), take_in)
    return onward, blocks.finished_statistics(block, _together(blocks, states, len(hidden)), sequences)


def _new_states(blocks: Blocks, needs: tuple[str, ...], weights: Sequence[Weights], sequences: int) -> list[State]:
    """What statistics begin with, on every device."""
    return [blocks.on(turn).new_statistics(needs, sequences) for turn in range(len(weights))]


def _by_sequence(
    blocks: Blocks, needs: tuple[str, ...], weights: Sequence[Weights], hidden: Batches, sequences: int
) -> State:
    """What is reduced over the tokens of each sequence, and on one device all else: a device takes its batches."""
    states = _new_states(blocks, needs, weights, sequences)

    def take_in(number: int) -> None:
        turn, first = blocks.devices.turn(number), number * blocks.batch
        states[turn] = programs.add_statistics(
            blocks.spec, weights[turn], hidden[number], states[turn], first, sequences
        )

    blocks.devices.each(len(hidden), take_in)
    return _together(blocks, states, len(hidden))


def _together(blocks: Blocks, states: Sequence[State], batches: int) -> State:
    """The rows of all batches on the first device, each from the device that took it."""
    if len(states) == 1:
        return states[0]
    devices, batch = blocks.devices, blocks.batch

    def together(name: str, kind: str) -> Array:
        owners = [states[devices.turn(number)][name][kind] for number in range(batches)]
        rows = [owner[number * batch : (number + 1) * batch] for number, owner in enumerate(owners)]
        return jnp.concatenate(devices.gathered(rows))

    return {name: {kind: together(name, kind) for kind in of_input} for name, of_input in states[0].items()}


def _by_input(
    blocks: Blocks, needs: tuple[str, ...], weights: Sequence[Weights], hidden: Batches, sequences: int
) -> State:
    """What sequences are summed up to: a device takes some inputs of all batches, in their order.

    Parts of a sum, and products of other shapes, would be rounded otherwise than on one device.
    """
    devices, together = blocks.devices, len(weights)
    mine = _shares(blocks.checkpoint.input_widths(), together)
    states = [blocks.on(turn).new_statistics(needs, sequences, share) for turn, share in enumerate(mine)]
    for first in range(0, len(hidden), together):
        found = devices.each(
            min(together, len(hidden) - first), partial(_inputs, blocks, weights, hidden[first : first + together])
        )
        states = devices.each(together, partial(_add_inputs, blocks, states, found, first, sequences))
        jax.block_until_ready(states)  # or inputs of later batches would arrive, and wait
    whole = {name: of_input for state in states for name, of_input in state.items()}
    return {name: devices.place(whole[name], 0) for name in blocks.checkpoint.input_widths()}


def _shares(widths: Mapping[str, int], devices: int) -> list[list[str]]:
    """Which inputs each device sums up: squares of widths evenly, and little on the first, which has more to hold."""
    shares: list[list[str]] = [[] for _ in range(devices)]
    for name in sorted(widths, key=lambda name: -widths[name]):
        min(reversed(shares), key=lambda share: sum(widths[other] ** 2 for other in share)).append(name)
    return shares


def _inputs(blocks: Blocks, weights: Sequence[Weights], hidden: Batches, turn: int) -> dict[str, Array]:
    found: dict[str, Array] = programs.inputs(blocks.spec, weights[turn], hidden[turn])
    return found


def _add_inputs(
    blocks: Blocks,
    states: Sequence[State],
    of_batches: Sequence[Mapping[str, Array]],
    first: int,
    sequences: int,
    turn: int,
) -> State:
    """A device's state with its inputs of some batches taken in, the first of which is batch `first`."""
    state = states[turn]
    for number, of_batch in enumerate(of_batches, first):
        here = blocks.devices.place({name: of_batch[name] for name in state}, turn)
        state = programs.add_inputs(here, state, number * blocks.batch, sequences)
    return state
