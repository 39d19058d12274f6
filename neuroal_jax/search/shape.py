"""Shape: a search over how sparsity is shaped in depth, over the kinds of linears, and over their rows.

A linear ramp in depth, which is all that NeuroAL's block step tries, explains little of the best known allocations. In
as many walks, four stages find more:

1. profiles: uniform, ramps, OWL, DLP and AlphaPruning;
2. rows: the best profile, with rows denser whose outputs are large; the best so far is the base;
3. directions: the base moved a little to and fro in each direction (`search/directions.py`), which gives a parabola's
   lowest point for each; its rows stay spread as they are;
4. line: the base moved by all these steps together, some shorter and some longer.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Array

from neuroal_jax.allocation import ALLOCATIONS, alpha, dlp, owl, uniform
from neuroal_jax.allocation.allocation import Allocation, Sparsity
from neuroal_jax.allocation.problem import Decision, Norms, Problem
from neuroal_jax.allocation.spread import HIGHEST, LOWEST
from neuroal_jax.masks.budget import shifted
from neuroal_jax.models.family import Rows
from neuroal_jax.numerics.statistics import Statistics
from neuroal_jax.search import block_step
from neuroal_jax.search.course import Course, Parameters
from neuroal_jax.search.directions import directions, most_directions, quadratic_step
from neuroal_jax.search.row_step import over_rows

_OWL_M, _OWL_LAMBDA, _DLP_LAMBDA, _ALPHA_EPSILON = 5.0, 0.08, 0.1, 0.1  # of the profiles

Measured = Mapping[str, list[float | None]]


def allocate(problem: Problem) -> Decision:
    """Searches the shape whose pruned model has the smallest objective.

    Raises:
        UserError: If a score is not finite.
    """
    options = problem.options
    course = Course(problem.model, options["shape_guard"])
    found, measured = profiles(problem)
    course.run("profiles", [({"profile": name}, fitted(values, problem)) for name, values in found.items()])
    profile, of_rows = course.best.allocation, _unspread
    if options["shape_row_lambdas"]:
        norms = problem.model.dense_norms(profile)
        spreads = {x: partial(rows, strength=x, norms=norms, problem=problem) for x in options["shape_row_lambdas"]}
        course.run("rows", [({"lambda": x}, spread(profile)) for x, spread in spreads.items()])
        of_rows = spreads[course.chosen["rows"]["lambda"]] if "rows" in course.chosen else _unspread
    around = directions(options["shape_depth"], problem.num_blocks, problem.family.linears, problem.shapes)
    if around:
        move = partial(moved, profile, problem=problem)
        steps = _explore(course, around, lambda change: of_rows(move(change)), problem.options)
        if any(steps.values()) and options["shape_etas"]:
            _follow(course, around, steps, lambda change: of_rows(move(change)), options["shape_etas"])
    best_of_linears = course.best.of_linears
    return Decision(
        course.best.allocation,
        course.stages,
        course.chosen,
        None if best_of_linears is None else [dict(zip(problem.linears, x, strict=True)) for x in best_of_linears],
        measured,
        course.gains,
    )


def stage_sizes(options: Mapping[str, Any], sparsity: float) -> list[int]:
    """Number of candidates of each stage, at most: some families have fewer directions."""
    del sparsity
    sizes = (
        4 + len(options["shape_ramps"]),
        len(options["shape_row_lambdas"]),
        2 * most_directions(options["shape_depth"]),
        len(options["shape_etas"]),
    )
    return [size for size in sizes if size]


def lone_walks(options: Mapping[str, Any]) -> int:
    """How many times one candidate walks alone: the base of the rows, for the norms of its inputs."""
    return 1 if options["shape_row_lambdas"] else 0


def settle(options: Mapping[str, Any], rows_alike: str) -> dict[str, Any]:
    """Without rows to tell apart there is no stage for them."""
    del rows_alike
    return {"shape_row_lambdas": ()} if options["shape_row_lambdas"] else {}


def profiles(problem: Problem) -> tuple[dict[str, Allocation], Measured]:
    """The first stage's candidates by name, and what of the dense model they were made from."""
    sparsity, linears, blocks = problem.sparsity, problem.linears, problem.num_blocks

    def of_block(weights: Mapping[str, Array], statistics: Mapping[str, Statistics]) -> dict[str, float]:
        outliers = owl.percentage(weights, statistics, _OWL_M)
        return {"outliers": outliers, "medians": dlp.block_median(weights, statistics)}

    both = problem.model.measure("profiles", ALLOCATIONS["shape"].needs, of_block, {"owl_m": _OWL_M})
    outliers, medians = ([float(of_block[name]) for of_block in both] for name in ("outliers", "medians"))
    alphas = alpha.measure(problem)
    ramps = {f"ramp {x:g}": block_step.candidate(sparsity, x, linears, blocks) for x in problem.options["shape_ramps"]}
    found = {
        "uniform": uniform.allocation(sparsity, linears, blocks),
        **ramps,
        "owl": owl.allocation(sparsity, _OWL_LAMBDA, outliers, linears),
        "dlp": dlp.allocation(sparsity, _DLP_LAMBDA, medians, linears),
        "alpha": alpha.allocation(sparsity, _ALPHA_EPSILON, alphas, linears, guard=True),
    }
    return found, {"outliers": [*outliers], "medians": [*medians], "alphas": alpha.recorded(alphas)}


def fitted(allocation: Allocation, problem: Problem) -> Allocation:
    """An allocation as one of this search, within [0.01, 0.99] and with the mean that was asked for."""
    blocks = tuple(
        {
            name: np.clip(s, LOWEST, HIGHEST) if isinstance(s, np.ndarray) else min(max(s, LOWEST), HIGHEST)
            for name, s in block.items()
        }
        for block in allocation.blocks
    )
    return shifted(Allocation("shape", blocks), problem.shapes, problem.sparsity)


Build = Callable[[np.ndarray], Allocation]  # of a change [block, linear] of the base


def _unspread(allocation: Allocation) -> Allocation:
    return allocation


def _explore(
    course: Course, around: Mapping[str, np.ndarray], build: Build, options: Mapping[str, Any]
) -> dict[str, float]:
    """Tries every direction to and fro; the step to take in each."""
    width, base = options["shape_width"], course.best.score
    candidates = [
        ({"direction": name, "distance": side}, build(side * values))
        for name, values in around.items()
        for side in (-width, width)
    ]
    scores = [trial.score for trial in course.run("directions", candidates)]
    pairs = zip(scores[::2], scores[1::2], strict=True)
    return {
        name: quadratic_step(minus, base, plus, width, options["shape_step"])
        for name, (minus, plus) in zip(around, pairs, strict=True)
    }


def _follow(
    course: Course, around: Mapping[str, np.ndarray], steps: Mapping[str, float], build: Build, etas: Sequence[float]
) -> None:
    """Tries multiples of all steps together."""
    candidates: list[tuple[Parameters, Allocation]] = []
    for eta in etas:
        distances = {name: round(eta * step, 9) for name, step in steps.items()}  # 0.03, not 0.030000000000000006
        change = np.sum([distances[name] * values for name, values in around.items()], axis=0)
        candidates.append(({"eta": eta, **distances}, build(change)))
    course.run("line", candidates)


def moved(base: Allocation, change: np.ndarray, problem: Problem) -> Allocation:
    """An allocation of linears with `change` `[block, linear]` added, within bounds and budget."""
    blocks: list[dict[str, Sparsity]] = [
        {name: float(block[name]) + float(x) for name, x in zip(problem.linears, of_block, strict=True)}
        for block, of_block in zip(base.blocks, change, strict=True)
    ]
    return fitted(Allocation(base.method, tuple(blocks)), problem)


def rows(base: Allocation, strength: float, norms: Norms, problem: Problem) -> Allocation:
    """Spreads each linear's sparsity over its rows by the logarithm of the norm of what each row becomes.

    Rows that go into the residual stream, which no linear reads as it is, keep their linear's sparsity.

    Args:
        base: Sparsities of linears.
        strength: lambda.
        norms: Of every input in the dense block behind what `base` prunes.
        problem: The model's linears.
    """

    def signal(block: int, part: Rows) -> np.ndarray:
        size = norms[block][part.feeds].astype(np.float64)
        seen = size[size > 0]
        if part.feeds_next_block or not len(seen):
            return np.zeros(len(size))
        return np.log(np.maximum(size, seen.min()))

    blocks: list[dict[str, Sparsity]] = [
        {
            linear.name: over_rows(
                linear,
                float(np.mean(sparsities[linear.name])),
                strength,
                [signal(b, part) for part in linear.parts],
                problem.config,
            )
            for linear in problem.family.linears
        }
        for b, sparsities in enumerate(base.blocks)
    ]
    return fitted(Allocation(base.method, tuple(blocks)), problem)
