"""manifest.json: everything needed to know, compare and repeat a run."""

import dataclasses
import resource
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from neuroal_jax.allocation.problem import Decision
from neuroal_jax.checkpoint.opened import Checkpoint
from neuroal_jax.data.windows import Windows
from neuroal_jax.machine.programs import Trace
from neuroal_jax.report.recorded import FORMAT
from neuroal_jax.run.compute import PrunedModel
from neuroal_jax.run.plan import Plan
from neuroal_jax.run.settle import SettledRun
from neuroal_jax.version import RESULT_PACKAGES, versions


def describe_windows(windows: Windows | None) -> dict[str, Any] | None:
    """Where token windows come from, how many, how long; the tokenizer, and where it puts a BOS; hashes."""
    if windows is None:
        return None
    count, seqlen = windows.ids.shape
    return {
        "origin": windows.origin,
        "windows": count,
        "seqlen": seqlen,
        "starts_with_bos": windows.starts_with_bos,
        "bos": windows.bos,
        "tokenizer": windows.tokenizer,
        "text_sha256": windows.text_sha256,
        "sha256": windows.sha256,
    }


def describe_perplexities(
    found: Mapping[str, Mapping[str, float]], windows: Mapping[str, Windows], seqlen: int
) -> dict[str, Any]:
    """Token perplexities: `dense` and `pruned` of the first text, and all `texts` by label with what they are."""
    texts = {name: {**found[name], **(describe_windows(windows[name]) or {})} for name in found}
    first: Mapping[str, Any] = next(iter(texts.values()), {})
    return {"dense": first.get("dense"), "pruned": first.get("pruned"), "seqlen": seqlen, "texts": texts}


def describe_search(decision: Decision) -> dict[str, Any]:
    """Every candidate of every stage with its parameters and score, the winner's, and what was measured.

    `lambda_block`, `lambda_row` and `scores` repeat what NeuroAL's steps say in `candidates`, for older readers.
    """
    scores = {stage: [candidate.score for candidate in found] for stage, found in decision.stages.items()}
    return {
        "lambda_block": decision.chosen.get("block", {}).get("lambda"),
        "lambda_row": decision.chosen.get("row", {}).get("lambda"),
        "scores": {"block": [], "row": [], **scores},
        "candidates": {
            stage: [{**candidate.parameters, "score": candidate.score} for candidate in found]
            for stage, found in decision.stages.items()
        },
        "chosen": {stage: dict(parameters) for stage, parameters in decision.chosen.items()},
        "alignment": decision.objective,
        "gains": {stage: dataclasses.asdict(gain) for stage, gain in decision.gains.items()},
        "measured": dict(decision.measured),
    }


def describe_machine(plan: Plan, processes: int, traces: Sequence[Trace]) -> dict[str, Any]:
    """The device, how the work was cut for it, and what it took; `traces`: programs that were not there before."""
    return {
        "device": jax.local_devices()[0].device_kind,
        "processes": processes,
        "devices": plan.devices,
        "candidate_batch": plan.candidate_batch,
        "traces": dict(Counter(trace.name for trace in traces)),
        "memory_bytes": {
            "planned_device_peak": plan.device_peak,
            "planned_host_peak": plan.host_peak,
            "device_peak": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
            "host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
    }


def describe_hashes(
    checkpoint: Checkpoint, weights: Mapping[str, str], data: Mapping[str, Windows | None]
) -> dict[str, Any]:
    """SHA-256 of the weights (all, and the prunable ones), of config.json and of the tokens used."""
    tokens = {name: None if windows is None else windows.sha256 for name, windows in data.items()}
    return {**weights, "config": checkpoint.config_file.sha256, **tokens}


def describe_pattern(settled: SettledRun, pruned: PrunedModel) -> dict[str, Any] | None:
    """How many weights of every few neighbours stay, by block; None where these are no sets of competitors."""
    asked = settled.config.kept_of
    if asked is None:
        return None
    weights = settled.budget.prunable // settled.budget.num_blocks
    kept = (sum(int(np.bitwise_count(bits).sum()) for bits in block.packed.values()) for block in pruned.blocks)
    return {"size": asked.size, "kept": [number * asked.size // weights for number in kept]}


def describe_run(
    settled: SettledRun,
    plan: Plan,
    pruned: PrunedModel,
    calibration: Windows,
    evaluations: Mapping[str, Windows],
    hashes: Mapping[str, str],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The content of manifest.json."""
    budget = settled.budget
    zeros = sum(sum(block.values()) for block in pruned.zeros)
    kept_zeros = sum(sum(block.kept_zeros.values()) for block in pruned.blocks)
    if not budget.is_met(zeros, kept_zeros):
        raise AssertionError(f"{zeros} zeros ({kept_zeros} kept) of {budget.prunable}, expected {budget.total}")
    data = {"calib": calibration, "eval": next(iter(evaluations.values()), None)}
    options = settled.config.plain()
    return {
        "format": FORMAT,
        **describe_search(pruned.decision),
        "objective": settled.config.objective if pruned.decision.stages else None,
        "damping": [block.damping for block in pruned.blocks if block.damping],
        "refit": [block.refits for block in pruned.blocks if block.refits],
        "sparsity": {
            "requested": budget.sparsity,
            "achieved": zeros / budget.prunable,
            "zeros": zeros,
            "pruned": zeros - kept_zeros,
            "source_zeros": budget.source_zeros,
            "prunable": budget.prunable,
        },
        "pattern": describe_pattern(settled, pruned),
        "linears": {linear: list(shape) for linear, shape in budget.shapes.items()},
        "zeros_per_linear": pruned.zeros,
        "token_ppl": describe_perplexities(pruned.token_ppl, evaluations, calibration.ids.shape[1]),
        "seconds": dict(seconds),
        "versions": versions(RESULT_PACKAGES),
        "hashes": describe_hashes(settled.checkpoint, hashes, data),
        "data": {name: describe_windows(windows) for name, windows in data.items()},
        **describe_machine(plan, settled.processes, pruned.traces),
        "options": options,
        "asked": {name: value for name, value in settled.asked.plain().items() if value != options[name]},
    }
