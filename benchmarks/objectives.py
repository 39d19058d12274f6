"""Which objective ranks allocations as the pruned models' perplexity does: Spearman correlations, in Markdown.

python -m benchmarks.objectives [--model DIR --calib FILE --eval FILE] [--sparsities 0.5,0.6,0.7]

Every objective scores the same allocations on the search set: uniform, ramps in depth of both signs, OWL, AlphaPruning,
and random shifts of every kind of linear. Then a model is pruned as each says, on the calibration set, of which the
search set is the first half, and its perplexity is measured on windows of another text.
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.table import markdown_lines
from neuroal_jax.allocation import ALLOCATIONS, uniform
from neuroal_jax.allocation.allocation import Allocation
from neuroal_jax.allocation.problem import Problem
from neuroal_jax.allocation.spread import guarded
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.command.config import PruneConfig
from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.data.windows import reader_for
from neuroal_jax.masks.budget import EXACT, Budget
from neuroal_jax.run.progress import Bars, heard_by, stage
from neuroal_jax.search import block_step
from neuroal_jax.search.objective import OBJECTIVES
from neuroal_jax.search.walked import WalkedModel
from neuroal_jax.walk import final
from neuroal_jax.walk.blocks import Blocks, batch_size
from neuroal_jax.walk.method import make_method
from neuroal_jax.walk.perplexity import perplexity

_SEARCH_TOKENS = 2048
_EVALUATION_TOKENS = 6144
_RAMPS = (0.05, 0.1, 0.2)
_SHIFT = 0.08  # standard deviation of a kind's random shift


def allocations_of(problem: Problem, random: int) -> dict[str, Allocation]:
    """The allocations that are compared, by name; `random` of them are random shifts of every kind of linear."""
    sparsity, linears, blocks = problem.sparsity, problem.linears, problem.num_blocks
    found = {"uniform": uniform.allocation(sparsity, linears, blocks)}
    for strength in (*_RAMPS, *(-x for x in _RAMPS)):
        found[f"ramp {strength:+g}"] = block_step.candidate(sparsity, strength, linears, blocks)
    for name in ("owl", "alpha"):
        found[name] = ALLOCATIONS.module(name).allocate(problem).allocation
    rng = np.random.default_rng(0)
    for number in range(random):
        shifted = guarded(sparsity + _SHIFT * rng.standard_normal(len(linears)))
        found[f"kinds {number}"] = Allocation("kinds", (dict(zip(linears, shifted.tolist(), strict=True)),) * blocks)
    return found


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """The correlation of ranks, without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def correlations(
    blocks: Blocks, config: PruneConfig, calibration: np.ndarray, evaluation: np.ndarray, random: int
) -> tuple[dict[str, float], list[float]]:
    """Each objective's correlation with the perplexities, and these."""
    checkpoint, method = blocks.checkpoint, make_method(config.pruner)
    assert config.sparsity is not None
    budget = Budget(checkpoint.linear_shapes(), checkpoint.num_blocks, config.sparsity, EXACT, method.pattern)
    search_set = calibration[: len(calibration) // 2]
    models = {name: WalkedModel(blocks, method, budget, name, calibration, search_set, 1, stage) for name in OBJECTIVES}
    problem = next(iter(models.values())).problem(config.plain())
    allocations = list(allocations_of(problem, random).values())
    scores = {name: model.score(name, allocations).totals for name, model in models.items()}
    perplexities = []
    with stage("perplexity", len(allocations), "model") as advance:
        for allocation in allocations:
            results = final.prune(blocks, method, calibration, budget.counts(allocation))
            perplexities.append(perplexity(blocks, evaluation, results))
            advance(1)
    return {name: spearman(values, perplexities) for name, values in scores.items()}, perplexities


def table(options: Mapping[str, Any]) -> list[str]:
    """Measures, and gives lines of Markdown."""
    checkpoint, seqlen = open_checkpoint(options["model"]), options["seqlen"]
    reader = reader_for(checkpoint, options["model"], seqlen)
    lines, size = [], 0
    for sparsity in options["sparsities"].split(","):
        config = PruneConfig(
            model=options["model"],
            sparsity=sparsity,
            pruner=options["pruner"],
            seqlen=seqlen,
            out="unused",
            **{name: options[name] for name in ("calib", "eval") if options[name]},
        )
        calibration = reader.calibration(config.calib, 2 * _SEARCH_TOKENS // seqlen, config.seed).ids
        evaluation = reader.evaluation(config.eval).ids[: _EVALUATION_TOKENS // seqlen]
        blocks = Blocks(checkpoint, "float32", batch_size(seqlen, len(calibration)))
        found, perplexities = correlations(blocks, config, calibration, evaluation, options["random"])
        size = len(perplexities)
        spread = f"{min(perplexities):.1f} to {max(perplexities):.1f}"
        lines.append([sparsity, *(f"{found[name]:.2f}" for name in OBJECTIVES), spread])
    head = ["sparsity", *OBJECTIVES, "perplexities"]
    conditions = (
        f"{options['model']}, {options['pruner']}, {size} allocations, {_SEARCH_TOKENS // seqlen} x {seqlen} tokens to "
        f"search, twice that to prune, {len(evaluation)} x {seqlen} to evaluate, seed 0, float32"
    )
    return [*markdown_lines(head, lines), "", conditions]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""

    def work() -> None:
        with Bars() as bars, heard_by(bars):
            print("\n".join(table(vars(make_parser().parse_args(arguments)))))

    return run_program(work)


def make_parser() -> Parser:
    parser = Parser(
        "python -m benchmarks.objectives",
        description="Which objective ranks allocations as the pruned models' perplexity does.",
        examples=("--sparsities 0.7 --random 5", "--model DIR --calib c4.jsonl --eval wikitext2.txt --seqlen 512"),
    )
    add = parser.add_argument
    add("--model", default="demo", help="as for the pruner (default: demo)")
    add("--calib", help="calibration text, as for the pruner")
    add("--eval", help="evaluation text, as for the pruner")
    add("--pruner", default="wanda", help="as for the pruner (default: wanda)")
    add("--seqlen", type=int, default=128, help="tokens of a sequence (default: 128)")
    add("--sparsities", default="0.5,0.6,0.7", help="separated by commas (default: 0.5,0.6,0.7)")
    add("--random", type=int, default=15, help="number of random allocations (default: 15)")
    return parser
