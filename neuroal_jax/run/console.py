"""What a run says to the person who started it."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from neuroal_jax.allocation.allocation import Allocation
from neuroal_jax.allocation.problem import Candidate, Decision, Gain
from neuroal_jax.checkpoint.opened import Checkpoint
from neuroal_jax.command.config import AUTO, PruneConfig
from neuroal_jax.data.windows import Windows
from neuroal_jax.masks.budget import Budget
from neuroal_jax.models.family import Shapes
from neuroal_jax.numerics.cholesky import DAMPING
from neuroal_jax.refine import NONE
from neuroal_jax.report.page import REPORT
from neuroal_jax.run.plan import Plan, gib
from neuroal_jax.run.settle import SettledRun
from neuroal_jax.search.objective import OBJECTIVES
from neuroal_jax.walk.final import BlockResult

log = logging.getLogger("neuroal_jax")


def print_choices(settled: SettledRun) -> None:
    """What the run settled on before it reads any text, and how to choose otherwise."""
    config, asked, checkpoint, budget = settled.config, settled.asked, settled.checkpoint, settled.budget
    shown = f"{checkpoint.family.name}, {budget.num_blocks} blocks, {budget.prunable:,} prunable weights"
    log.info(
        "model: %s (%s), of which %s go (--sparsity %g)", config.model, shown, f"{budget.total:,}", budget.sparsity
    )
    device = settled.devices.every[0]
    own = "the checkpoint's own" if config.dtype == checkpoint.dtype else "as always on a CPU"
    why = own if asked.dtype == AUTO else "as asked"
    message = "device: %d x %s; computing in %s, %s (--devices, --dtype)"
    log.info(message, len(settled.devices), device.device_kind, config.dtype, why)
    refined = "" if config.refine == NONE else f", then {config.refine}"
    tried = f", {' + '.join(map(str, settled.stage_sizes))} candidates tried" if settled.stage_sizes else ""
    message = "method: which weights go, by %s; how many where, by %s%s%s (--pruner, --allocation, --refine)"
    log.info(message, config.pruner, config.allocation, tried, refined)
    log.info("texts: %s for calibration, %s for perplexity (--calib, --eval)", config.calib, config.eval)
    log.info("results: %s (--out)", config.directory)


def print_sizes(plan: Plan, calibration: Windows, config: PruneConfig) -> None:
    """How much text the run takes, and by the plan how much memory."""
    samples, seqlen = calibration.ids.shape
    searched = f", {min(config.search_samples, samples)} of them to search with" if config.searches else ""
    message = "calibration: %d sequences of %d tokens%s (--nsamples, --seqlen, --search-samples)"
    log.info(message, samples, seqlen, searched)
    kind, peak, free, room = "device", plan.device_peak, plan.device_available, "as fit"
    if plan.devices_share_host:
        kind, peak, free, room = "host", plan.host_peak, plan.devices * free, "as its cache takes"
    why = room if config.candidate_batch is None else "as asked"
    together = f"; {plan.candidate_batch} candidates at a time, {why} (--candidate-batch)"
    log.info(
        "memory: %s peak %s by estimate, %s are free%s",
        kind,
        gib(peak),
        gib(free),
        together if plan.candidate_batch else "",
    )
    log.info("all options: python -m neuroal_jax.prune --help; with --dry-run, the plan alone")


def print_perplexity(state: str, value: float, windows: Windows) -> None:
    """One line: `dense token_ppl@2048 (wikitext2, 166 windows): 5.47`."""
    count, seqlen = windows.ids.shape
    log.info("%s token_ppl@%d (%s, %d windows): %.4f", state, seqlen, windows.origin, count, value)


def print_search(decision: Decision, objective: str) -> None:
    """The winner of each stage that was searched, with its score and the range of all candidates' scores.

    With it, where it had to be better than the best before it: by how much it was, and whether it was kept.
    """
    for stage, candidates in decision.stages.items():
        if stage not in decision.chosen and stage not in decision.gains:
            continue
        best, worst = min(candidates, key=_score), max(candidates, key=_score)
        parameters = ", ".join(f"{name} {_short(value)}" for name, value in best.parameters.items())
        message = "%s step: %s (%s score %.6g; %d candidates, worst %.6g)%s"
        gain = f", {_describe(decision.gains[stage])}" if stage in decision.gains else ""
        log.info(message, stage, parameters, objective, best.score, len(candidates), worst.score, gain)


def _score(candidate: Candidate) -> float:
    return candidate.score


def _short(value: float | str | None) -> str:
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def _describe(gain: Gain) -> str:
    """`kept: better by 0.1 ± 0.02`."""
    error = "" if gain.error is None else f" ± {gain.error:.2g}"
    how = "better" if gain.mean >= 0 else "worse"
    return f"{'kept' if gain.kept else 'refused'}: {how} by {abs(gain.mean):.3g}{error} than the best before"


def warn_of_few_tokens(tokens: int, objective: str) -> None:
    """One line where a search set is so small that a search fits what is special to it."""
    least = OBJECTIVES[objective].least_tokens
    if tokens < least:
        message = "the search set has %d tokens; below %d, a search by %s overfits: give more with --search-samples"
        log.warning(message, tokens, least, objective)


def print_damping(blocks: list[BlockResult]) -> None:
    """How many Hessians took more than the first damping."""
    dampings = [damping for block in blocks for damping in block.damping.values()]
    raised = sum(damping > DAMPING[0] for damping in dampings)
    if raised:
        message = "%d of %d linears took more than the damping %g: see 'damping' in the manifest"
        log.info(message, raised, len(dampings), DAMPING[0])


def print_blocks(allocation: Allocation, zeros: list[int], shapes: Shapes) -> None:
    """A table: sparsity asked of and achieved by every block."""
    log.info("%5s  %9s  %9s", "block", "requested", "achieved")
    size = sum(math.prod(shape) for shape in shapes.values())
    for number, (block, pruned) in enumerate(zip(allocation.blocks, zeros, strict=True)):
        requested = sum(float(np.mean(s)) * math.prod(shapes[linear]) for linear, s in block.items()) / size
        log.info("%5d  %9.4f  %9.4f", number, requested, pruned / size)


def print_result(manifest: Mapping[str, Any], out: Path, saved: str | None) -> None:
    """The last lines: achieved sparsity and whose zeros these are, where the outputs are, and what zeros do not do."""
    sparsity = manifest["sparsity"]
    log.info(
        "sparsity: %.6f requested, %.6f achieved (%d zeros of %d prunable weights)",
        sparsity["requested"],
        sparsity["achieved"],
        sparsity["zeros"],
        sparsity["prunable"],
    )
    if sparsity["source_zeros"] or sparsity["pruned"] != sparsity["zeros"]:
        message = "of these zeros, %d were in the model before; the masks prune %d"
        log.info(message, sparsity["source_zeros"], sparsity["pruned"])
    if (pattern := manifest["pattern"]) is not None:
        kept = " ".join(map(str, pattern["kept"])) if len(set(pattern["kept"])) > 1 else pattern["kept"][0]
        log.info("of every %d neighbours in a row stay, in block after block: %s", pattern["size"], kept)
        if not math.isclose(sparsity["requested"], sparsity["pruned"] / sparsity["prunable"], abs_tol=1e-6):
            log.info("whole numbers of %d come no closer to the sparsity that was requested", pattern["size"])
    places = str(out) if saved is None else f"{out}, pruned model in {saved}"
    log.info("written to %s. Zeros in dense tensors alone make nothing smaller or faster.", places)
    log.info("to look at it, open %s in a browser", out / REPORT)


def print_plan(plan: Plan, checkpoint: Checkpoint, model: str, budget: Budget) -> None:
    """The plan of a dry run."""
    log.info("%s: %s, %d blocks, %s", model, checkpoint.family.name, plan.num_blocks, checkpoint.dtype)
    log.info("%-24s  %8s  %8s  %14s", "linear (in every block)", "out", "in", "weights")
    for name, (out, width) in plan.linears.items():
        log.info("%-24s  %8d  %8d  %14d", name, out, width, out * width)
    log.info("prunable weights: %d, to remove: %d", budget.prunable, budget.total)
    if plan.devices > 1:
        log.info("devices: %d", plan.devices)
    if plan.candidate_batch:
        log.info("candidates per batch: %d", plan.candidate_batch)
    first = "first device's" if plan.devices > 1 else "device"
    log.info("%s memory peak: %s of %s", first, gib(plan.device_peak), gib(plan.device_available))
    log.info("host memory peak: %s", gib(plan.host_peak))
    log.info("bytes to be written: %d (and allocation.json, manifest.json, report.html)", plan.output_bytes)
    log.info("state for --resume while it runs: %s at most", gib(plan.state_bytes))
    log.info("dry run: no weights were read, nothing was written")
