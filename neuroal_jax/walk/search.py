"""Scoring candidates: how well does a model that is pruned as each says follow the dense one."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from neuroal_jax.allocation.problem import Differences, Norms
from neuroal_jax.data.tokens import token_hash
from neuroal_jax.numerics.selection import Counts
from neuroal_jax.numerics.statistics import norms
from neuroal_jax.resume.measured import digest
from neuroal_jax.walk import programs
from neuroal_jax.walk.blocks import Advance, Blocks, ignore, repeated
from neuroal_jax.walk.method import Method
from neuroal_jax.walk.programs import Objective


def dense_needs(method: Method) -> tuple[str, ...]:
    """Statistics of the dense run that pruning a candidate and comparing it take."""
    return tuple(sorted({*method.unrefined.needs, "squares"}))


def score(
    blocks: Blocks,
    method: Method,
    objective: Objective,
    windows: np.ndarray,
    candidates: Sequence[Counts],
    batch: int,
    advance: Advance = ignore,
) -> np.ndarray:
    """The objective of each candidate, `[candidate, block, linear]` (fp32 values as float64); its sum is the score.

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
    spec, method, needs = blocks.spec, method.unrefined, dense_needs(method)
    groups = [list(candidates[start : start + batch]) for start in range(0, len(candidates), batch)]
    counted = method.sequence_weights(len(windows))
    about = {**_about(method, objective, windows, candidates), "candidates together": batch}
    steps = blocks.begin("search", lambda done: advance(done * len(candidates)), about)
    hidden = steps.hidden(lambda: blocks.embed([windows]))  # one for all; behind the first block, one per group
    scores = np.zeros((len(groups), batch, blocks.last + 1, len(spec.linears)))
    for block, output in enumerate(steps.outputs):
        scores[:, :, block] = output["scores"]
    for block, weights in blocks.read(steps.first):
        same = block == 0  # no candidate differs from the others yet
        shared = repeated(programs.dense_run(spec, needs, weights, hidden[0]), batch) if same else None
        entering, hidden = hidden, []
        for index, group in enumerate(groups):
            padded = group + [group[-1]] * (batch - len(group))
            quotas = jax.tree.map(lambda *leaves: np.stack(leaves), *(candidate[block] for candidate in padded))
            of_group = repeated(entering[0], batch) if same else entering[index]
            statistics = shared or programs.dense_runs(spec, needs, weights, of_group)
            pruned = programs.prune_candidates(spec, method, weights, statistics, quotas)
            blocks.check_damping(block, pruned.damping)
            compare = programs.compare_last if block == blocks.last else programs.compare
            squares = _squares(statistics)
            compared = compare(spec, objective, weights.rest, pruned.kept, of_group, squares, counted)
            hidden.append(compared.hidden)
            scores[index, :, block] = compared.scores
            blocks.check_finite(block, scores[index, :, block].sum(axis=0))
            advance(len(group))
        steps.record(block, hidden, {"scores": scores[:, :, block]})
    return scores.reshape(-1, *scores.shape[2:])[: len(candidates)]


def align(
    blocks: Blocks,
    method: Method,
    objective: Objective,
    windows: np.ndarray,
    counts: Counts,
    advance: Advance = ignore,
) -> tuple[np.ndarray, Differences]:
    """One candidate's objective `[block, linear]` and, per block, the `D - S` of every input (fp32)."""
    spec, method, needs = blocks.spec, method.unrefined, dense_needs(method)
    counted = method.sequence_weights(len(windows))
    one_candidate = jax.tree.map(lambda leaf: np.asarray(leaf)[None], counts)
    steps = blocks.begin("alignment", advance, _about(method, objective, windows, [counts]))
    hidden = steps.hidden(lambda: repeated(blocks.embed([windows]), 1))
    scores = [output["scores"] for output in steps.outputs]
    differences = [output["differences"] for output in steps.outputs]
    for block, weights in blocks.read(steps.first):
        statistics = repeated(programs.dense_run(spec, needs, weights, hidden[0][0]), 1)
        pruned = programs.prune_candidates(spec, method, weights, statistics, one_candidate[block])
        blocks.check_damping(block, pruned.damping)
        squares = _squares(statistics)
        compared = programs.compare(spec, objective, weights.rest, pruned.kept, hidden[0], squares, counted)
        hidden = [compared.hidden]
        scores.append(np.asarray(compared.scores[0], dtype=np.float64))
        blocks.check_finite(block, scores[-1])
        differences.append({name: np.asarray(value[0]) for name, value in compared.differences.items()})
        steps.record(block, hidden, {"scores": scores[-1], "differences": differences[-1]})
        advance(1)
    return np.stack(scores), differences


def dense_norms(
    blocks: Blocks, method: Method, windows: np.ndarray, counts: Counts, advance: Advance = ignore
) -> Norms:
    """Per block, the norms of every input in the dense block behind one candidate's pruned blocks (fp32)."""
    spec, method, needs = blocks.spec, method.unrefined, dense_needs(method)
    one_candidate = jax.tree.map(lambda leaf: np.asarray(leaf)[None], counts)
    steps = blocks.begin("norms", advance, _about(method, None, windows, [counts]))
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


def _about(
    method: Method, objective: Objective | None, windows: np.ndarray, candidates: Sequence[Counts]
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
        **({} if objective is None else {"objective": f"{objective.__module__}.{objective.__qualname__}"}),
        "counts": digest(arrays),
    }


def candidates_together(sizes: Sequence[int], limit: int) -> int:
    """How many candidates to run at once: the most, up to `limit`, that wastes at most a tenth on filling up batches.

    Args:
        sizes: Numbers of candidates of the stages to come.
        limit: The most that memory or the user allows.
    """

    def waste(batch: int) -> int:
        return sum(-size % batch for size in sizes)

    limit = min(limit, max(sizes))
    return next(batch for batch in range(limit, 0, -1) if 10 * waste(batch) <= sum(sizes))
