"""Scoring candidates: how well does a model that is pruned as each says follow the dense one."""

import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np

from neuroal_jax.allocation.problem import Differences, Norms, Scores
from neuroal_jax.checkpoint.opened import Checkpoint
from neuroal_jax.data.tokens import token_hash
from neuroal_jax.masks.budget import prunable_weights
from neuroal_jax.numerics.kl import Dense
from neuroal_jax.numerics.selection import Counts
from neuroal_jax.numerics.statistics import norms
from neuroal_jax.resume.measured import digest
from neuroal_jax.walk import head, programs
from neuroal_jax.walk.blocks import Advance, Blocks, ignore, repeated
from neuroal_jax.walk.method import Method
from neuroal_jax.walk.programs import Candidates, Objective, StatisticsOfInputs, Weights

# Of a group of candidates, runs a block that is pruned as each says: its number, the group's, the block, what is pruned
# of it, the input, and the dense statistics; gives the next block's input.
RunGroup = Callable[[int, int, Weights, Candidates, Any, StatisticsOfInputs], Any]


def dense_needs(method: Method) -> tuple[str, ...]:
    """Statistics of the dense run that pruning a candidate and comparing it take."""
    return tuple(sorted({*method.unrefined.needs, "squares"}))


def work(checkpoint: Checkpoint, method: Method) -> int:
    """What `score_by_head` tells `advance` of each candidate in all: the weights that every token is multiplied by."""
    return checkpoint.num_blocks * _of_block(checkpoint, method) + math.prod(checkpoint.head_shape())


def _of_block(checkpoint: Checkpoint, method: Method) -> int:
    """The weights of a pruned block, and of the dense one before it where that is run for statistics."""
    return prunable_weights(checkpoint.linear_shapes(), 2 if method.unrefined.needs else 1)


def score(
    blocks: Blocks,
    method: Method,
    objective: Objective,
    windows: np.ndarray,
    candidates: Sequence[Counts],
    batch: int,
    advance: Advance = ignore,
) -> Scores:
    """Scores of every linear (fp32 values as float64), by an objective that compares inputs of linears.

    Args:
        blocks: The model.
        method: How weights are chosen; its refinement plays no part.
        objective: Compares an input's norms in the dense and in the pruned run.
        windows: Token ids `[n, tokens]`: the search set.
        candidates: How many weights go in every set of competitors, for each candidate.
        batch: How many candidates run together; the last batch is filled up with copies.
        advance: Told the number of candidates in a batch, after every batch of every block.

    Raises:
        UserError: If activations are not finite.
    """
    spec, method, groups = blocks.spec, method.unrefined, _groups(candidates, batch)
    counted = method.sequence_weights(len(windows))
    about = {**about_scores(method, _name(objective), windows, candidates), "candidates together": batch}
    steps = blocks.begin("search", lambda done: advance(done * len(candidates)), about)
    # One for all; behind the first block, one per group.
    hidden = steps.hidden(lambda: blocks.embed([windows]), blocks.devices.put)
    scores = np.zeros((len(groups), batch, blocks.last + 1, len(spec.linears)))
    for block, output in enumerate(steps.outputs):
        scores[:, :, block] = output["scores"]

    def run(
        block: int, group: int, weights: Weights, pruned: Candidates, hidden: Any, statistics: StatisticsOfInputs
    ) -> Any:
        compare = programs.compare_last if block == blocks.last else programs.compare
        compared = compare(spec, objective, weights.rest, pruned.kept, hidden, _squares(statistics), counted)
        scores[group, :, block] = compared.scores
        blocks.check_finite(block, scores[group, :, block].sum(axis=0))
        advance(min(batch, len(candidates) - group * batch))
        return compared.hidden

    for block, outputs in _through_blocks(blocks, method, dense_needs(method), hidden, steps.first, groups, run):
        steps.record(block, outputs, {"scores": scores[:, :, block]})
        advance(0)  # in this thread, where a listener is told of what others did
    return Scores(of_linears=scores.reshape(-1, *scores.shape[2:])[: len(candidates)])


def score_by_head(
    blocks: Blocks,
    method: Method,
    objective: ModuleType,
    dense: Dense | None,
    windows: np.ndarray,
    candidates: Sequence[Counts],
    batch: int,
    advance: Advance = ignore,
) -> Scores:
    """Scores of every sequence (fp32 values as float64), by an objective that reads the head.

    Args:
        blocks: The model.
        method: How weights are chosen; its refinement plays no part.
        objective: Code of the objective, see `search/objective.py`.
        dense: The dense model's distributions on the windows, where the objective compares with them.
        windows: Token ids `[n, tokens]`: the search set.
        candidates: How many weights go in every set of competitors, for each candidate.
        batch: How many candidates run together; the last batch is filled up with copies.
        advance: Told of weights, see `work`.

    Raises:
        UserError: If a score is not finite.
    """
    method, groups = method.unrefined, _groups(candidates, batch)
    of_block = _of_block(blocks.checkpoint, method)
    about = {**about_scores(method, objective.__name__, windows, candidates), "candidates together": batch}
    steps = blocks.begin("search", lambda done: advance(done * len(candidates) * of_block), about)
    if steps.first > blocks.last:
        advance(len(candidates) * math.prod(blocks.checkpoint.head_shape()))
        return Scores(of_sequences=np.asarray(steps.outputs[blocks.last]["scores"]))
    hidden = steps.hidden(lambda: blocks.embed([windows]), blocks.devices.put)

    def run(
        block: int, group: int, weights: Weights, pruned: Candidates, hidden: Any, statistics: StatisticsOfInputs
    ) -> Any:
        del block, statistics
        hidden = jax.block_until_ready(programs.run_candidates(blocks.spec, weights.rest, pruned.kept, hidden))
        advance(min(batch, len(candidates) - group * batch) * of_block)
        return hidden

    for block, outputs in _through_blocks(blocks, method, method.needs, hidden, steps.first, groups, run):
        if block < blocks.last:
            steps.record(block, outputs)
        advance(0)  # as above
    scores = head.scores(blocks, objective, dense, windows, outputs, lambda size: advance(len(candidates) * size))
    steps.record(blocks.last, [], {"scores": scores[: len(candidates)]})
    return Scores(of_sequences=scores[: len(candidates)])


def _groups(candidates: Sequence[Counts], batch: int) -> list[list[Counts]]:
    """Candidates that run together; the last group is filled up with copies."""
    groups = [list(candidates[start : start + batch]) for start in range(0, len(candidates), batch)]
    return [group + [group[-1]] * (batch - len(group)) for group in groups]


def _through_blocks(
    blocks: Blocks,
    method: Method,
    needs: tuple[str, ...],
    hidden: list[Any],
    first: int,
    groups: list[list[Counts]],
    run: RunGroup,
) -> Iterator[tuple[int, list[Any]]]:
    """Every block from `first` on, with the next one's input of every group.

    Args:
        blocks: The model.
        method: How weights are chosen.
        needs: Statistics of the dense run; without any there is none.
        hidden: The first block's input: of all in the model's first block, else of each group.
        first: Block.
        groups: Candidates that run together; groups are divided over devices.
        run: Runs the pruned block of a group.
    """
    for block, weights in blocks.read(first):
        hidden = _through_block(blocks, method, needs, block, weights, hidden, groups, run)
        yield block, hidden


def _through_block(
    blocks: Blocks,
    method: Method,
    needs: tuple[str, ...],
    block: int,
    weights: Weights,
    hidden: list[Any],
    groups: list[list[Counts]],
    run: RunGroup,
) -> list[Any]:
    """The next block's input of every group; see `_through_blocks`."""
    spec, devices, batch = blocks.spec, blocks.devices, len(groups[0])
    same = block == 0  # no candidate differs from the others yet
    shared = [
        repeated(copy, batch)
        for copy in devices.copies(
            programs.dense_run(spec, needs, weights, hidden[0]) if same and needs else {}, len(groups)
        )
    ]
    entering = devices.copies(hidden[0], len(groups)) if same else devices.spread(hidden)
    of_device = devices.copies(weights, len(groups))

    def of_group(number: int) -> Any:
        turn, group = devices.turn(number), groups[number]
        weights = of_device[turn]
        quotas = jax.tree.map(lambda *leaves: np.stack(leaves), *(candidate[block] for candidate in group))
        hidden = repeated(entering[turn], batch) if same else entering[number]
        statistics = shared[turn] or (programs.dense_runs(spec, needs, weights, hidden) if needs else {})
        pruned = programs.prune_candidates(spec, method, weights, statistics, quotas)
        blocks.check_damping(block, pruned.damping)
        return run(block, number, weights, pruned, hidden, statistics)

    return devices.each(len(groups), of_group)


def align(
    blocks: Blocks,
    method: Method,
    objective: Objective | None,
    windows: np.ndarray,
    counts: Counts,
    advance: Advance = ignore,
) -> tuple[Scores | None, Differences]:
    """One candidate's scores, where an objective is given, and the `D - S` of every input in every block (fp32)."""
    spec, method, needs = blocks.spec, method.unrefined, dense_needs(method)
    counted = method.sequence_weights(len(windows))
    one_candidate = jax.tree.map(lambda leaf: np.asarray(leaf)[None], counts)
    steps = blocks.begin("alignment", advance, about_scores(method, _name(objective), windows, [counts]))
    hidden = steps.hidden(lambda: repeated(blocks.embed([windows]), 1))
    scores = [output["scores"] for output in steps.outputs if objective]
    differences = [output["differences"] for output in steps.outputs]
    for block, weights in blocks.read(steps.first):
        statistics = repeated(programs.dense_run(spec, needs, weights, hidden[0][0]), 1)
        pruned = programs.prune_candidates(spec, method, weights, statistics, one_candidate[block])
        blocks.check_damping(block, pruned.damping)
        squares = _squares(statistics)
        compared = programs.compare(spec, objective, weights.rest, pruned.kept, hidden[0], squares, counted)
        hidden = [compared.hidden]
        found: dict[str, Any] = {}
        if compared.scores is not None:
            found["scores"] = np.asarray(compared.scores[0], dtype=np.float64)
            blocks.check_finite(block, found["scores"])
            scores.append(found["scores"])
        found["differences"] = {name: np.asarray(value[0]) for name, value in compared.differences.items()}
        differences.append(found["differences"])
        steps.record(block, hidden, found)
        advance(1)
    return (Scores(of_linears=np.stack(scores)[None]) if objective else None), differences


def dense_norms(
    blocks: Blocks, method: Method, windows: np.ndarray, counts: Counts, advance: Advance = ignore
) -> Norms:
    """Per block, the norms of every input in the dense block behind one candidate's pruned blocks (fp32)."""
    spec, method, needs = blocks.spec, method.unrefined, dense_needs(method)
    one_candidate = jax.tree.map(lambda leaf: np.asarray(leaf)[None], counts)
    steps = blocks.begin("norms", advance, about_scores(method, None, windows, [counts]))
    hidden = steps.hidden(lambda: blocks.embed([windows]))
    found = [output["norms"] for output in steps.outputs]
    for block, weights in blocks.read(steps.first):
        statistics = programs.dense_run(spec, needs, weights, hidden[0])
        found.append({name: np.asarray(norms(of_input["squares"])) for name, of_input in statistics.items()})
        blocks.check_finite(block, np.array([found[-1][linear.reads].sum() for linear in spec.linears]))
        if block < blocks.last:
            pruned = programs.prune_candidates(spec, method, weights, repeated(statistics, 1), one_candidate[block])
            blocks.check_damping(block, pruned.damping)
            kept = {name: weight[0] for name, weight in pruned.kept.items()}
            hidden = [programs.run(spec, programs.Weights(kept, weights.rest), hidden[0])]
        steps.record(block, hidden, {"norms": found[-1]})
        advance(1)
    return found


def _squares(statistics: programs.StatisticsOfInputs) -> programs.StatisticsOfInputs:
    """Of all statistics, what candidates are compared by."""
    return {name: {"squares": of_input["squares"]} for name, of_input in statistics.items()}


def about_scores(
    method: Method, objective: str | None, windows: np.ndarray, candidates: Sequence[Counts]
) -> dict[str, Any]:
    """What scores depend on beside the model; where its weights are zero, which quotas may tell too, is its own."""
    quotas = {
        f"{number}/{block}/{linear}/{'zeros' if quota.zeros is None else 'zeros first'}": quota
        for number, counts in enumerate(candidates)
        for block, of_block in enumerate(counts)
        for linear, quota in of_block.items()
    }
    arrays = {
        f"{name}/{part}": np.asarray(getattr(quota, part))
        for name, quota in quotas.items()
        for part in ("pruned", "ties")
    }
    return {
        "tokens": token_hash(windows),
        "method": repr(method),
        "objective": objective,
        "counts": digest(arrays),
    }


def _name(function: Objective | None) -> str | None:
    """Of an objective's code."""
    return None if function is None else f"{function.__module__}.{function.__qualname__}"


def candidates_together(sizes: Sequence[int], limit: int, devices: int = 1) -> int:
    """How many candidates to run at once on a device: the most, up to `limit`, that loses at most a tenth of the time.

    It is lost on filling up batches, and while some devices wait for others.

    Args:
        sizes: Numbers of candidates of the stages to come.
        limit: The most that memory or the user allows.
        devices: How many run a batch each at the same time.
    """

    def one_after_the_other(batch: int) -> int:
        return sum(-(-size // (batch * devices)) * batch for size in sizes)

    batches = range(min(limit, max(sizes)), 0, -1)
    least = min(map(one_after_the_other, batches))
    return next(batch for batch in batches if 10 * one_after_the_other(batch) <= 11 * least)
