"""The story of a run, top to bottom: read, calibrate, allocate, prune, write."""

import logging
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import jax

from neuroal_jax.allocation.file import describe
from neuroal_jax.command.config import AUTO, PruneConfig
from neuroal_jax.data import Windows, check_sources, read_evaluations, reader_for
from neuroal_jax.errors import UserError
from neuroal_jax.files.records import record_of, to_json
from neuroal_jax.files.writing import write_json
from neuroal_jax.machine.compilation import make_room, use_cache
from neuroal_jax.machine.interrupts import background
from neuroal_jax.machine.memory import (
    LOWER,
    exhaustion_explained,
    freed_memory_kept,
    refuse_what_cannot_fit,
    return_freed,
)
from neuroal_jax.machine.processes import Waiting, waiting
from neuroal_jax.masks.file import save_masks
from neuroal_jax.resume import state as resume
from neuroal_jax.run import console, outputs
from neuroal_jax.run.compute import compute
from neuroal_jax.run.identity import identify, measured_in
from neuroal_jax.run.manifest import describe_run
from neuroal_jax.run.plan import plan_run, reads_text, refuse_small_devices
from neuroal_jax.run.processes import gather, group_of, help_first, on_own_devices
from neuroal_jax.run.progress import Clock, Listener, heard_by, stage
from neuroal_jax.run.result import PruneResult
from neuroal_jax.run.settle import SettledRun, settle

log = logging.getLogger("neuroal_jax")


def prune(config: PruneConfig, progress: Listener | None = None) -> PruneResult:
    """Prunes a model as `config` says and writes the results: what `python -m neuroal_jax.prune` does, in Python.

    Shows and prints nothing: messages go to the logger `neuroal_jax`, at the level INFO; so do warnings, which Python
    prints to stderr where no logging is set up. The compilation cache is left as the caller set JAX up, unless `config`
    names a directory.

    Args:
        config: All options.
        progress: Called with a `Progress` when a stage of the run begins, and then at least once for every block that
            it goes through, in the thread that called `prune`. What it returns is ignored, and no result depends on it.
            An exception of it (or Ctrl-C) ends the run: nothing half-written is left, and `resume=True` goes on later.
            Errors of files and memory, and a UserError, come as a RuntimeError then, as they are not the run's.
            Of several processes only the first one calls it.

    Returns:
        Directory of the results, manifest, masks and allocation. In a notebook it shows itself as a summary.

    Raises:
        UserError: For anything in the options, the model or the data that cannot be used, for results that are there
            already without `overwrite=True`, and for too little memory. Nothing is left behind then.

    Example:
        >>> import tempfile, neuroal_jax
        >>> config = neuroal_jax.PruneConfig(
        ...     model="demo", sparsity=0.7, allocation="uniform", nsamples=4, eval="none", out=tempfile.mkdtemp()
        ... )
        >>> stages = []
        >>> result = neuroal_jax.prune(config, progress=lambda now: stages.append(now.stage))
        >>> list(dict.fromkeys(stages))
        ['open model', 'read texts', 'prune', 'write']
        >>> f"{result.manifest['sparsity']['achieved']:.4f}"
        '0.7000'
    """
    if config.compilation_cache not in (AUTO, "none"):
        use_cache(Path(config.compilation_cache))
    make_room()
    group = group_of(config)
    with exhaustion_explained(LOWER), on_own_devices(config):
        if group is not None and group.rank > 0:
            if not config.dry_run:
                help_first(config, group)
            return PruneResult(None, None, {})
        with heard_by(progress):
            if config.dry_run:
                return _plan(config, 1 if group is None else group.processes)
            if group is None:
                return _prune(config)
            with waiting(group) as others:
                return _prune(config, others)


def _plan(config: PruneConfig, processes: int) -> PruneResult:
    """The dry run of one of so many processes."""
    settled = settle(config)
    check_sources(config.calib, config.evaluations, config.text_column)
    # Token files are quick to read, and say how long their sequences are; texts are not.
    calibration, evaluations = (None, {}) if reads_text(config) else _read_data(settled)
    plan = plan_run(settled, calibration, evaluations, processes)
    console.print_plan(plan, settled.checkpoint, config.model, settled.budget)
    refuse_small_devices(plan)
    return PruneResult(None, plan, {})


def _prune(config: PruneConfig, others: Waiting | None = None) -> PruneResult:
    """The run, in its first process; `others`: where the other ones come to."""
    clock = Clock()
    with clock("read"), stage("open model", 1, "step") as advance:
        settled = settle(config)
        advance(1)
    console.print_choices(settled)
    check_sources(config.calib, config.evaluations, config.text_column)
    checkpoint, target = settled.checkpoint, Path(config.directory)
    told = nullcontext() if others is None else others.told()
    with ExitStack() as stack, background() as thread, told, exhaustion_explained(LOWER):
        results = stack.enter_context(outputs.stage_results(settled))
        out, saved = results.out, results.saved
        zeros = thread.submit(checkpoint.zeros)
        with clock("read"), stage("read texts", 1, "step") as advance:
            calibration, evaluations = _read_data(settled)
            settled = replace(settled, budget=replace(settled.budget, zeros=zeros.result()))
            advance(1)
        hashes = thread.submit(checkpoint.hashes)
        if others is not None:
            settled = gather(settled, others, hashes.result()["model"])
        plan = plan_run(settled, calibration, evaluations)
        refuse_what_cannot_fit(plan.certain_host)
        identity = identify(
            settled.config, settled.budget.sparsity, checkpoint, calibration, evaluations, settled.processes
        )
        # Runs that take what others measured wait for the weights' hash; it is quick beside a walk.
        measured = None
        if config.measured is not None:
            measured = measured_in(config.measured, str(target), checkpoint, hashes.result()["model"])
        state = stack.enter_context(
            resume.kept(
                target,
                identity,
                plan.candidate_batch,
                hashes,
                resume=config.resume,
                start_over=config.overwrite or config.out is not None,  # a place that nobody named is shared by chance
                measured=measured,
            )
        )
        plan = replace(plan, candidate_batch=state.candidate_batch)
        console.print_sizes(plan, calibration, settled.config)
        move = outputs.move_to_files(results.scratch)
        return_freed()  # by the tokenizer, above all
        with freed_memory_kept() if jax.default_backend() == "cpu" else nullcontext():
            pruned = compute(settled, plan.candidate_batch, calibration, evaluations, clock, move, state)
        state.check_weights(hashes.result()["model"])
        with clock("write"), stage("write", 1, "step") as advance:
            masks = outputs.pack_masks(settled, pruned, hashes.result()["prunable"])
            save_masks(out / outputs.MASKS, masks)
            names = checkpoint.prunable()
            allocation = describe(pruned.allocation, names, settled.budget.sparsity)
            write_json(out / outputs.ALLOCATION, allocation)
            if saved is not None:
                checkpoint.save_edited(saved, outputs.edit_of(names, pruned, masks))
            advance(1)
        manifest = describe_run(settled, plan, pruned, calibration, evaluations, hashes.result(), clock.seconds)
        if measured is not None:
            manifest["reused"] = measured.reused
        manifest["files"] = to_json(record_of(out))
        write_json(out / outputs.MANIFEST, manifest)
        outputs.write_report(out, manifest, allocation)
        checkpoint.check_unchanged()
        results.publish()
        state.remove()
    console.print_result(manifest, target, config.model_directory)
    return PruneResult(target, plan, manifest, masks, pruned.allocation)


def _read_data(settled: SettledRun) -> tuple[Windows, dict[str, Windows]]:
    """Calibration windows, and evaluation windows of every text by its label."""
    config = settled.config
    reader = reader_for(settled.checkpoint, config.model, config.seqlen, config.text_column)
    calibration = reader.calibration(config.calib, config.nsamples, config.seed)
    if len(calibration.ids) < config.nsamples:
        log.info("%s has %d rows: all are used (--nsamples %d)", config.calib, len(calibration.ids), config.nsamples)
    if config.search_refine and len(calibration.ids) <= config.search_samples:
        raise UserError(
            f"--search-refine fits candidates on calibration sequences outside of the {len(calibration.ids)} that they "
            f"are scored on, and --calib has {len(calibration.ids)} in all: give more, or a smaller --search-samples"
        )
    return calibration, read_evaluations(replace(reader, seqlen=calibration.ids.shape[1]), config.evaluations)
