"""The story of a run, top to bottom: read, calibrate, allocate, prune, write."""

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from neuroal_jax import __version__
from neuroal_jax.allocation import allocation as allocations
from neuroal_jax.allocation import alpha, owl
from neuroal_jax.allocation.allocation import Allocation
from neuroal_jax.checkpoint.opened import Checkpoint, open_checkpoint
from neuroal_jax.command.config import ALLOCATIONS, AUTO, PruneConfig
from neuroal_jax.data.windows import Windows, check_sources, default_seqlen, read_evaluations, reader_for
from neuroal_jax.errors import UserError
from neuroal_jax.files.writing import replace_text, spilled, staged, write_json
from neuroal_jax.machine.compilation import use_cache
from neuroal_jax.machine.interrupts import background
from neuroal_jax.machine.memory import LOWER, exhaustion_explained, freed_memory_kept, refuse_what_cannot_fit
from neuroal_jax.masks.budget import count, fit_mean, prunable_weights
from neuroal_jax.masks.file import PackedMasks, save_masks
from neuroal_jax.pruners import PRUNERS
from neuroal_jax.refine.dsnot import Dsnot
from neuroal_jax.report.page import REPORT, run_report
from neuroal_jax.resume import state as resume
from neuroal_jax.resume.state import State
from neuroal_jax.run import console, manifest
from neuroal_jax.run.plan import Plan, Workload, make_plan
from neuroal_jax.search.search import Found, Lambdas, lambdas_for, search, work_units
from neuroal_jax.walk import programs
from neuroal_jax.walk.blocks import BlockResult, Keep, Walk, batch_size
from neuroal_jax.walk.programs import Method

log = logging.getLogger("neuroal_jax")

MASKS, ALLOCATION, MANIFEST, MODEL = "masks.safetensors", "allocation.json", "manifest.json", "model"


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
    if config.compilation_cache != AUTO:
        use_cache(config.compilation_cache)
    with exhaustion_explained(LOWER), freed_memory_kept() if jax.default_backend() == "cpu" else nullcontext():
        return _prune(config)


def _prune(config: PruneConfig) -> PruneResult:
    clock = _Clock()
    with clock("read"):
        task = _open(config)
    check_sources(config.calib, config.evaluations)
    if config.dry_run:
        # Token files are quick to read, and say how long their sequences are; texts are not.
        plan = _plan(task, *((None, {}) if _reads_text(config) else _read_data(task)))
        console.print_plan(plan, task.checkpoint, config.model, task.sparsity)
        return PruneResult(None, plan, {})
    target = Path(config.out or "")
    with ExitStack() as stack, background() as thread:
        stale = MODEL if _holds_a_model(target) else None
        out = stack.enter_context(
            staged(target, overwrite=config.overwrite, marker=MANIFEST, flag="--out", stale=stale)
        )
        saved = _stage_model(config, out, stack)
        with clock("read"):
            calibration, evaluations = _read_data(task)
        hashes = thread.submit(task.checkpoint.hashes)
        plan = _plan(task, calibration, evaluations)
        refuse_what_cannot_fit(plan.certain_host)
        identity = resume.identify(task.config, task.sparsity, task.checkpoint, calibration, evaluations)
        state = stack.enter_context(resume.kept(target, identity, plan.candidate_batch, hashes, resume=config.resume))
        plan = replace(plan, candidate_batch=state.candidate_batch)
        spill = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=out)))
        result = _compute(task, plan, calibration, evaluations, clock, _keep_in(spill), state)
        state.check_weights(hashes.result()["model"])
        with clock("write"):
            packed = _pack(task, result, hashes.result()["prunable"])
            save_masks(out / MASKS, packed)
            names = task.checkpoint.prunable()
            allocation = allocations.describe(result.allocation, names, task.sparsity)
            write_json(out / ALLOCATION, allocation)
            if saved is not None:
                task.checkpoint.save_edited(saved, _edit(names, result.blocks, packed))
        settled = task.config.plain()
        asked = {name: value for name, value in config.plain().items() if value != settled[name]}
        content = _manifest(task, result, calibration, evaluations, hashes.result(), clock, asked)
        write_json(out / MANIFEST, content)
        _write_report(out / REPORT, content, allocation)
        task.checkpoint.check_unchanged()
    state.remove()
    console.print_result(content, target, config.model_directory)
    return PruneResult(target, result.plan, content, packed, result.allocation)


def _write_report(path: Path, content: Mapping[str, Any], allocation: Mapping[str, Any]) -> None:
    try:
        page = run_report(content, allocation)
    except Exception as error:  # a page that cannot be drawn must not cost the hours behind its numbers
        log.warning("no %s was made (%r): see 'python -m neuroal_jax.report'", path.name, error)
        return
    replace_text(path, page)


def _open(config: PruneConfig) -> Task:
    """Opens the model and settles what depends on it or on the machine."""
    checkpoint = open_checkpoint(config.model)
    shapes = checkpoint.linear_shapes()
    pruner = PRUNERS[config.pruner]
    given, requested = None, None
    if config.allocation not in ALLOCATIONS:
        names = checkpoint.prunable()
        given, requested = allocations.load_allocation(Path(config.allocation), names, shapes, checkpoint.num_blocks)
        requested = requested or allocations.mean_sparsity(given, shapes)
        if pruner.over_rows and any(isinstance(s, np.ndarray) for block in given.blocks for s in block.values()):
            raise UserError(
                f"--allocation {config.allocation} lists rows, but --pruner {config.pruner} chooses over all rows of a "
                "linear: use an allocation of NeuroAL's block step, or another pruner"
            )
    sparsity = config.sparsity or requested
    if sparsity is None or not 0 < sparsity < 1:
        raise UserError(f"--allocation {config.allocation} has the mean sparsity {sparsity}: give --sparsity")
    lambdas = Lambdas((), ())
    if config.allocation == "neuroal":
        if pruner.over_rows and config.step == "both":
            log.info("%s chooses over all rows of a linear: NeuroAL searches its block step only", config.pruner)
            config = replace(config, step="block")
        lambdas = lambdas_for(config.step, config.block_lambdas, config.row_lambdas, sparsity)
    if config.dtype == AUTO:
        config = replace(config, dtype="float32" if jax.default_backend() == "cpu" else checkpoint.dtype)
    return Task(replace(config, save_model=config.model_directory), checkpoint, sparsity, given, lambdas)


def _read_data(task: Task) -> tuple[Windows, dict[str, Windows]]:
    """Calibration windows, and evaluation windows of every text by its label."""
    config = task.config
    reader = reader_for(task.checkpoint, config.model, config.seqlen)
    calibration = reader.calibration(config.calib, config.nsamples, config.seed)
    if len(calibration.ids) < config.nsamples:
        log.info("%s has %d rows: all are used (--nsamples %d)", config.calib, len(calibration.ids), config.nsamples)
    return calibration, read_evaluations(replace(reader, seqlen=calibration.ids.shape[1]), config.evaluations)


def _holds_a_model(target: Path) -> bool:
    """Whether an earlier run wrote its pruned model into `target`; it must not stay beside the masks of this one."""
    try:
        saved = json.loads((target / MANIFEST).read_text())["options"]["save_model"]
        return os.path.realpath(saved) == os.path.realpath(target / MODEL)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _reads_text(config: PruneConfig) -> bool:
    """Whether calibration or evaluation is text, not a file of token ids."""
    return not all(source.endswith((".npy", ".npz")) for source in [config.calib, *config.evaluations])


def _stage_model(config: PruneConfig, out: Path, stack: ExitStack) -> Path | None:
    if config.model_directory is None:
        return None
    target = Path(config.model_directory)
    if config.out is not None and os.path.realpath(target) == os.path.realpath(Path(config.out) / MODEL):
        if os.path.lexists(target) and not config.overwrite:
            raise UserError(f"{target} exists already: pass --overwrite to replace it, or choose another --save-model")
        (out / MODEL).mkdir()  # appears together with the masks
        return out / MODEL
    return stack.enter_context(
        staged(
            target, overwrite=config.overwrite, marker="config.json", flag="--save-model", stale="model*.safetensors*"
        )
    )


def _plan(task: Task, calibration: Windows | None, evaluations: Mapping[str, Windows]) -> Plan:
    """The plan; before the data is read, with the sizes that the options ask for."""
    config = task.config
    samples, seqlen = config.nsamples, config.seqlen or default_seqlen(config.model)
    if calibration is not None:
        samples, seqlen = calibration.ids.shape
    work = Workload(
        steps=task.lambdas.steps,
        search_samples=min(config.search_samples, samples),
        samples=samples,
        windows=max((len(windows.ids) for windows in evaluations.values()), default=0),
        seqlen=seqlen,
        batch=batch_size(seqlen, samples),
        dtype=config.dtype,
        save_model=config.save_model is not None or PRUNERS[config.pruner].updates_weights,
        method=_method(config),
        reads_text=_reads_text(config),
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
    """What the computing middle of a run found.

    `zeros` counts the pruned weights of every linear, per block; `token_ppl` has every text's `dense` and `pruned`
    perplexity.
    """

    plan: Plan
    found: Found
    allocation: Allocation
    blocks: list[BlockResult]
    zeros: list[dict[str, int]]
    token_ppl: dict[str, dict[str, float]]


def _compute(
    task: Task,
    plan: Plan,
    calibration: Windows,
    evaluations: Mapping[str, Windows],
    clock: _Clock,
    keep: Keep,
    state: State,
) -> Computed:
    """Perplexity before, allocation, pruning, perplexity after."""
    config, checkpoint, shapes = task.config, task.checkpoint, task.checkpoint.linear_shapes()
    programs.trace_counts.clear()
    samples, seqlen = calibration.ids.shape
    walk = Walk(checkpoint, _method(config), config.dtype, batch_size(seqlen, samples), state)

    token_ppl: dict[str, dict[str, float]] = {name: {} for name in evaluations}

    def measure(state: str, blocks: list[BlockResult] | None) -> None:
        for name, windows in evaluations.items():
            with clock(f"perplexity_{state}"), _progress(f"{state} perplexity", checkpoint.num_blocks, "block") as bar:
                token_ppl[name][state] = walk.perplexity(windows.ids, blocks, bar.update)
            console.print_perplexity(state, token_ppl[name][state], windows)

    measure("dense", None)
    found = _allocate(task, walk, calibration.ids, plan.candidate_batch, clock)
    counts = count(found.allocation, shapes, config.budget, task.sparsity, walk.spec.method.competing)
    with clock("prune"), _progress("prune", checkpoint.num_blocks, "block") as bar:
        blocks = walk.prune(calibration.ids, counts, bar.update, keep)
    allocation = found.allocation
    if config.budget == "exact":
        allocation = fit_mean(allocation, shapes, task.sparsity)
    zeros = [
        {
            linear: math.prod(shapes[linear]) - int(np.bitwise_count(packed).sum())
            for linear, packed in block.packed.items()
        }
        for block in blocks
    ]
    console.print_damping(blocks)
    console.print_blocks(allocation, [sum(block.values()) for block in zeros], shapes)
    measure("pruned", blocks)
    return Computed(plan, found, allocation, blocks, zeros, token_ppl)


def _allocate(task: Task, walk: Walk, windows: np.ndarray, candidate_batch: int, clock: _Clock) -> Found:
    """How much of every block and row goes, by the method that was asked for."""
    config, blocks = task.config, task.checkpoint.num_blocks
    linears = [linear.name for linear in task.checkpoint.family.linears]
    if task.given is not None:
        return Found(task.given)
    if config.allocation == "neuroal":
        total = work_units(task.lambdas, blocks)
        with clock("search"), _progress("search", total, "candidate-block") as bar:
            few = windows[: config.search_samples]
            found = search(walk, few, task.sparsity, task.lambdas, config.budget, candidate_batch, bar.update)
        console.print_lambdas(found)
        return found
    if config.allocation == "owl":
        with clock("search"), _progress("outliers", blocks, "block") as bar:
            outliers = walk.outliers(windows, config.owl_m, bar.update)
        return Found(
            owl.allocation(task.sparsity, config.owl_lambda, outliers, linears), measured={"outliers": list(outliers)}
        )
    if config.allocation == "alpha":
        with clock("search"), _progress("spectra", blocks, "block") as bar:
            alphas = alpha.block_alphas(_counted(walk.spectra(), bar))
        guard = config.budget == "exact"
        return Found(
            alpha.allocation(task.sparsity, config.alpha_epsilon, alphas, linears, guard=guard),
            measured={"alphas": [value if math.isfinite(value) else None for value in alphas]},
        )
    return Found(allocations.uniform(task.sparsity, linears, blocks))


def _method(config: PruneConfig) -> Method:
    reference = config.budget == "reference"
    refine = Dsnot(config.dsnot_cycles, config.dsnot_threshold, reference) if config.refine == "dsnot" else None
    discounted = reference and config.pruner == "sparsegpt"
    return Method(config.pruner, config.sparsegpt_group, refine, discounted)


def _keep_in(directory: Path) -> Keep:
    """Moves updated weights to files, so that host memory holds one block of them."""

    def keep(block: int, updated: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: spilled(array, directory / f"{block}.{name}") for name, array in updated.items()}

    return keep


def _edit(
    names: Mapping[str, tuple[int, str]], blocks: list[BlockResult], masks: PackedMasks
) -> Callable[[str, np.ndarray], np.ndarray]:
    """What to store in place of a tensor: its updated weights, or itself with zeros."""

    def edit(name: str, weight: np.ndarray) -> np.ndarray:
        block, linear = names[name]
        updated = blocks[block].updated
        return updated[linear] if updated else masks.prune(name, weight)

    return edit


def _counted(items: Iterator[Any], bar: tqdm) -> Iterator[Any]:
    for item in items:
        yield item
        bar.update(1)


def _progress(what: str, total: int, unit: str) -> tqdm:
    quiet = not log.isEnabledFor(logging.INFO)
    return tqdm(total=total, desc=what, unit=unit, disable=quiet, leave=False)


def _pack(task: Task, result: Computed, source: str) -> PackedMasks:
    """The masks of all blocks under their Hugging Face names."""
    packed, widths, kept_zeros = {}, {}, {}
    shapes = task.checkpoint.linear_shapes()
    for name, (block, linear) in task.checkpoint.prunable().items():
        packed[name] = result.blocks[block].packed[linear]
        widths[name] = shapes[linear][1]
        if result.blocks[block].kept_zeros[linear]:
            kept_zeros[name] = result.blocks[block].kept_zeros[linear]
    method = f"{task.config.pruner} + {result.allocation.method}"
    run = {
        "method": method if task.config.refine == "none" else f"{method} + {task.config.refine}",
        "weights": "updated" if PRUNERS[task.config.pruner].updates_weights else "kept",
        "budget": task.config.budget,
        "sparsity": repr(task.sparsity),
        "neuroal_jax": __version__,
    }
    return PackedMasks(packed, widths, kept_zeros, source, run)


def _manifest(
    task: Task,
    result: Computed,
    calibration: Windows,
    evaluations: Mapping[str, Windows],
    hashes: Mapping[str, str],
    clock: _Clock,
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    prunable = prunable_weights(result.plan.linears, task.checkpoint.num_blocks)
    zeros = sum(sum(block.values()) for block in result.zeros)
    if task.config.budget == "exact" and zeros != round(task.sparsity * prunable):
        raise AssertionError(f"{zeros} zeros of {prunable} weights, expected {round(task.sparsity * prunable)}")
    data = {"calib": calibration, "eval": next(iter(evaluations.values()), None)}
    return {
        "format": manifest.FORMAT,
        **manifest.describe_search(result.found),
        "damping": manifest.describe_damping(result.blocks),
        "sparsity": {
            "requested": task.sparsity,
            "achieved": zeros / prunable,
            "zeros": zeros,
            "prunable": prunable,
        },
        "linears": {linear: list(shape) for linear, shape in result.plan.linears.items()},
        "zeros_per_linear": result.zeros,
        "token_ppl": manifest.describe_perplexities(result.token_ppl, evaluations, calibration.ids.shape[1]),
        "seconds": clock.seconds,
        "versions": manifest.versions(),
        "hashes": manifest.describe_hashes(task.checkpoint, hashes, data),
        "data": {name: manifest.describe_windows(windows) for name, windows in data.items()},
        **manifest.describe_machine(result.plan, programs.trace_counts),
        "options": task.config.plain(),
        "asked": asked,
    }
