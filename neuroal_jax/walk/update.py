"""Changing the kept weights of a pruned block, one input of its linears after the other."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from neuroal_jax.errors import UserError
from neuroal_jax.models.family import by_input
from neuroal_jax.numerics.least_squares import Products, no_products
from neuroal_jax.walk import programs
from neuroal_jax.walk.blocks import Batches, Blocks
from neuroal_jax.walk.method import Update
from neuroal_jax.walk.programs import InputsOfBoth, PrunedBlock, Weights


def update(
    blocks: Blocks,
    of_input: Update,
    block: int,
    dense: Weights,
    pruned: PrunedBlock,
    hidden: Batches,
    of_dense: Batches,
    sequences: int,
) -> tuple[PrunedBlock, dict[str, dict[str, float]]]:
    """Changes the kept weights of all linears that read an input, then those that read the next one.

    Each input is measured in the block whose linears before it are updated already, and in the dense block. The former
    reads what comes out of the pruned blocks; the latter a mean of that and of what it reads in the dense model: the
    one alone would keep what pruned blocks did wrong, the other alone asks for more than a block can give back.

    Args:
        blocks: The model.
        of_input: How weights change.
        block: Number of the block.
        dense: The block's weights.
        pruned: The pruned block.
        hidden: The block's input behind the pruned blocks, in batches.
        of_dense: Its input in the dense model; empty where that has no share.
        sequences: How many sequences of these count.

    Returns:
        The block with other kept weights in fp32, and by linear `error_before` and `error_after`, how far its output is
        from the dense one as a share of that one's size; and `iterations`.

    Raises:
        UserError: If activations or weights are not finite.
    """
    weights, records = dict(pruned.weights.linears), {}
    aims = hidden
    if of_dense:
        aims = [programs.mean(h, d, of_input.dense_share) for h, d in zip(hidden, of_dense, strict=True)]
    known = [InputsOfBoth({}, {}) for _ in hidden]  # each batch's latest input: what computed it is settled
    for name, linears in by_input(blocks.spec.linears).items():
        now = Weights({linear: weight.astype(blocks.dtype) for linear, weight in weights.items()}, dense.rest)
        products = _products(blocks, name, dense, now, hidden, aims, known, sequences)
        of_linears = (
            {linear: found[linear] for linear in linears} for found in (dense.linears, weights, pruned.packed)
        )
        updated = programs.update_weights(of_input, *of_linears, products)
        errors = {linear: np.asarray(error) for linear, error in updated.errors.items()}
        _check(blocks, block, of_input, errors)
        weights |= updated.weights
        for linear, (before, after) in errors.items():
            iterations = int(updated.iterations)
            records[linear] = {"error_before": float(before), "error_after": float(after), "iterations": iterations}
    ordered = {linear.name: records[linear.name] for linear in blocks.spec.linears}
    return pruned._replace(weights=Weights(weights, dense.rest)), ordered


def _products(
    blocks: Blocks,
    name: str,
    dense: Weights,
    pruned: Weights,
    hidden: Batches,
    aims: Batches,
    known: list[InputsOfBoth],
    sequences: int,
) -> Products:
    """The products of an input, which is one if both blocks read the same and no linear comes before it.

    What is `known` of each batch becomes this input, and nothing behind the last one, which may be the widest.
    """
    inputs = list(by_input(blocks.spec.linears))
    same = aims is hidden and name == inputs[0]
    with blocks.here():
        outputs = sum(len(dense.linears[linear]) for linear in by_input(blocks.spec.linears)[name])
        products = no_products(blocks.checkpoint.input_widths()[name], outputs, same=same)
    for number, (h, aim) in enumerate(zip(hidden, aims, strict=True)):
        first = number * blocks.batch
        products, found = programs.add_products(
            blocks.spec, name, dense, pruned, h, aim, known[number], products, first, sequences
        )
        known[number] = found if name != inputs[-1] else InputsOfBoth({}, {})
    return products


def _check(blocks: Blocks, block: int, of_input: Update, errors: Mapping[str, Float[np.ndarray, "2"]]) -> None:
    """Raises UserError where the output before or after is not finite."""
    for linear, (before, after) in errors.items():
        if not np.isfinite(before):
            raise UserError(
                f"block {block}: the input or the output of {linear} is not finite in {blocks.dtype}: "
                "try --dtype float32"
            )
        if not np.isfinite(after):
            raise UserError(
                f"block {block}: --refine {of_input.refinement} makes the weights of {linear} not finite: use other "
                "calibration text, or --refine none"
            )
