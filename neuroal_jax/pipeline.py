"""The story of a run, top to bottom: read, calibrate, allocate, prune, write."""

import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from neuroal_jax import __version__, block_ops, console, manifest
from neuroal_jax import allocation as allocations
from neuroal_jax.allocation import Allocation
from neuroal_jax.allocation.neuroal.search import Found, Lambdas, lambdas_for, search, work_units
from neuroal_jax.budget import Counts, count, fit_mean, prunable_weights, zeros_of
from neuroal_jax.checkpoint import Checkpoint, open_checkpoint
from neuroal_jax.config import ALLOCATIONS, AUTO, PruneConfig
from neuroal_jax.data import Windows, default_seqlen, reader_for
from neuroal_jax.errors import UserError
from neuroal_jax.masks import PackedMasks, save_masks
from neuroal_jax.output import staged, write_json
from neuroal_jax.plan import Plan, Workload, make_plan
from neuroal_jax.walk import BlockMasks, Walk, batch_size

log = logging.getLogger("neuroal_jax")

MASKS, ALLOCATION, MANIFEST = "masks.safetensors", "allocation.json", "manifest.json"


@dataclass(frozen=True)
class PruneResult:
    """What a run gives back.

    Attributes:
        out: Directory of the results; None for a dry run.
        plan: Memory, candidates per batch, sizes.
        manifest: The content of manifest.json; empty for a dry run.
        masks: The packed masks; None for a dry run.
        allocation: Sparsity of every linear; None for a dry run.
    """

    out: Path | None
    plan: Plan
    manifest: Mapping[str, Any]
    masks: PackedMasks | None = None
    allocation: Allocation | None = None


@dataclass(frozen=True)
class Task:
    """What a run works on, before any data is read.

    Attributes:
        config: The options, with everything resolved that depends on the model or the machine.
        checkpoint: The opened model.
        sparsity: Share of weights to remove.
        given: The allocation of a file, if one was named.
        lambdas: The candidates of the search; none without a search.
    """

    config: PruneConfig
    checkpoint: Checkpoint
    sparsity: float
    given: Allocation | None
    lambdas: Lambdas


def prune(config: PruneConfig) -> PruneResult:
    """Prunes a model as `config` says and writes the results.

    Raises:
        UserError: For anything in the options, the model or the data that cannot be used. Nothing is left behind then.
    """
    clock = _Clock()
    with clock("read"):
        task = _open(config)
    if config.dry_run:
        plan = _plan(task, None, None)
        console.print_plan(plan, task.checkpoint, config.model, task.sparsity)
        return PruneResult(None, plan, {})
    target = Path(config.out or "")
    with ExitStack() as stack, ThreadPoolExecutor(max_workers=1) as background:
        out = stack.enter_context(staged(target, overwrite=config.overwrite, marker=MANIFEST, flag="--out"))
        saved = _stage_model(config, stack)
        with clock("read"):
            calibration, evaluation = _read_data(task)
        hashes = background.submit(task.checkpoint.hashes)
        result = _compute(task, calibration, evaluation, clock)
        with clock("write"):
            packed = _pack(task, result, hashes.result()["prunable"])
            save_masks(out / MASKS, packed)
            names = task.checkpoint.prunable()
            allocations.save_allocation(out / ALLOCATION, result.allocation, names, task.sparsity)
            if saved is not None:
                task.checkpoint.save_edited(saved, packed.prune)
        content = _manifest(task, result, calibration, evaluation, hashes.result(), clock)
        write_json(out / MANIFEST, content)
    console.print_result(content, target, config.save_model)
    return PruneResult(target, result.plan, content, packed, result.allocation)


def _open(config: PruneConfig) -> Task:
    """Opens the model and settles what depends on it or on the machine."""
    checkpoint = open_checkpoint(config.model)
    shapes = checkpoint.linear_shapes()
    given, requested = None, None
    if config.allocation not in ALLOCATIONS:
        names = checkpoint.prunable()
        given, requested = allocations.load_allocation(Path(config.allocation), names, shapes, checkpoint.num_blocks)
        requested = requested or allocations.mean_sparsity(given, shapes)
    sparsity = config.sparsity or requested
    if sparsity is None or not 0 < sparsity < 1:
        raise UserError(f"--allocation {config.allocation} has the mean sparsity {sparsity}: give --sparsity")
    lambdas = Lambdas((), ())
    if config.allocation == "neuroal":
        lambdas = lambdas_for(config.step, config.block_lambdas, config.row_lambdas, sparsity)
    if config.dtype == AUTO:
        config = replace(config, dtype="float32" if jax.default_backend() == "cpu" else checkpoint.dtype)
    return Task(config, checkpoint, sparsity, given, lambdas)


def _read_data(task: Task) -> tuple[Windows, Windows | None]:
    config = task.config
    reader = reader_for(task.checkpoint, config.model, config.seqlen)
    calibration = reader.calibration(config.calib, config.nsamples, config.seed)
    if len(calibration.ids) < config.nsamples:
        log.info("%s has %d rows: all are used (--nsamples %d)", config.calib, len(calibration.ids), config.nsamples)
    if config.eval == "none":
        return calibration, None
    return calibration, replace(reader, seqlen=calibration.ids.shape[1]).evaluation(config.eval)


def _stage_model(config: PruneConfig, stack: ExitStack) -> Path | None:
    if config.save_model is None:
        return None
    target = Path(config.save_model)
    return stack.enter_context(
        staged(
            target, overwrite=config.overwrite, marker="config.json", flag="--save-model", stale="model*.safetensors*"
        )
    )


def _plan(task: Task, calibration: Windows | None, evaluation: Windows | None) -> Plan:
    """The plan; before the data is read, with the sizes that the options ask for."""
    config = task.config
    samples, seqlen = config.nsamples, config.seqlen or default_seqlen(config.model)
    if calibration is not None:
        samples, seqlen = calibration.ids.shape
    work = Workload(
        steps=task.lambdas.steps,
        search_samples=min(config.search_samples, samples),
        samples=samples,
        windows=0 if evaluation is None else len(evaluation.ids),
        seqlen=seqlen,
        batch=batch_size(seqlen, samples),
        dtype=config.dtype,
        save_model=config.save_model is not None,
    )
    return make_plan(task.checkpoint, work, config.candidate_batch)


class _Clock:
    """Wall seconds per phase, in the order in which the phases first ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - start, 3)


@dataclass(frozen=True)
class Computed:
    """What the computing middle of a run found."""

    plan: Plan
    found: Found
    allocation: Allocation
    counts: Counts
    masks: list[BlockMasks]
    token_ppl: dict[str, float | None]


def _compute(task: Task, calibration: Windows, evaluation: Windows | None, clock: _Clock) -> Computed:
    """Perplexity before, allocation, pruning, perplexity after."""
    config, checkpoint, shapes = task.config, task.checkpoint, task.checkpoint.linear_shapes()
    block_ops.trace_counts.clear()
    plan = _plan(task, calibration, evaluation)
    samples, seqlen = calibration.ids.shape
    walk = Walk(checkpoint, config.pruner, config.dtype, batch_size(seqlen, samples))

    def measure(state: str, masks: list[BlockMasks] | None) -> float | None:
        if evaluation is None:
            return None
        with clock(f"perplexity_{state}"), _progress(f"{state} perplexity", checkpoint.num_blocks, "block") as bar:
            value = walk.perplexity(evaluation.ids, masks, bar.update)
        console.print_perplexity(state, value, evaluation)
        return value

    dense = measure("dense", None)
    found = Found(task.given or allocations.uniform(task.sparsity, list(shapes), checkpoint.num_blocks))
    if task.lambdas.steps:
        windows = calibration.ids[: config.search_samples]
        total = work_units(task.lambdas, checkpoint.num_blocks)
        with clock("search"), _progress("search", total, "candidate-block") as bar:
            found = search(walk, windows, task.sparsity, task.lambdas, config.budget, plan.candidate_batch, bar.update)
        console.print_lambdas(found)
    counts = count(found.allocation, shapes, config.budget, task.sparsity)
    with clock("prune"), _progress("prune", checkpoint.num_blocks, "block") as bar:
        masks = walk.prune(calibration.ids, counts, bar.update)
    allocation = found.allocation
    if config.budget == "exact":
        allocation = fit_mean(allocation, shapes, task.sparsity)
    console.print_blocks(allocation, counts, shapes)
    return Computed(plan, found, allocation, counts, masks, {"dense": dense, "pruned": measure("pruned", masks)})


def _progress(what: str, total: int, unit: str) -> tqdm:
    quiet = not log.isEnabledFor(logging.INFO)
    return tqdm(total=total, desc=what, unit=unit, disable=quiet, leave=False)


def _pack(task: Task, result: Computed, source: str) -> PackedMasks:
    """The masks of all blocks under their Hugging Face names."""
    packed, widths, kept_zeros = {}, {}, {}
    shapes = task.checkpoint.linear_shapes()
    for name, (block, linear) in task.checkpoint.prunable().items():
        packed[name] = result.masks[block].packed[linear]
        widths[name] = shapes[linear][1]
        if result.masks[block].kept_zeros[linear]:
            kept_zeros[name] = result.masks[block].kept_zeros[linear]
    run = {
        "method": f"{task.config.pruner} + {result.allocation.method}",
        "budget": task.config.budget,
        "sparsity": repr(task.sparsity),
        "neuroal_jax": __version__,
    }
    return PackedMasks(packed, widths, kept_zeros, source, run)


def _manifest(
    task: Task,
    result: Computed,
    calibration: Windows,
    evaluation: Windows | None,
    hashes: Mapping[str, str],
    clock: _Clock,
) -> dict[str, Any]:
    prunable, zeros = prunable_weights(result.plan.linears, task.checkpoint.num_blocks), zeros_of(result.counts)
    if task.config.budget == "exact" and zeros != round(task.sparsity * prunable):
        raise AssertionError(f"{zeros} zeros of {prunable} weights, expected {round(task.sparsity * prunable)}")
    data = {"calib": calibration, "eval": evaluation}
    return {
        "format": manifest.FORMAT,
        **manifest.describe_search(result.found),
        "sparsity": {
            "requested": task.sparsity,
            "achieved": zeros / prunable,
            "zeros": zeros,
            "prunable": prunable,
        },
        "token_ppl": {**result.token_ppl, "seqlen": calibration.ids.shape[1]},
        "seconds": clock.seconds,
        "versions": manifest.versions(),
        "hashes": manifest.describe_hashes(task.checkpoint, hashes, data),
        "data": {name: manifest.describe_windows(windows) for name, windows in data.items()},
        **manifest.describe_machine(result.plan, block_ops.trace_counts),
        "options": manifest.describe_options(task.config),
    }
