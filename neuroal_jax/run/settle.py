"""Options that depend on the model or the machine, settled: once, before any data is read."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from neuroal_jax.allocation import ALLOCATIONS
from neuroal_jax.allocation.allocation import Allocation, mean_sparsity
from neuroal_jax.allocation.file import load_allocation
from neuroal_jax.checkpoint.opened import Checkpoint, open_checkpoint
from neuroal_jax.command.config import AUTO, PruneConfig
from neuroal_jax.command.values import ALL, flag
from neuroal_jax.errors import UserError
from neuroal_jax.machine.devices import Devices, devices
from neuroal_jax.machine.slurm import neighbours
from neuroal_jax.masks.budget import Budget
from neuroal_jax.masks.patterns import KeptOf
from neuroal_jax.search.shared import Helpers
from neuroal_jax.walk.method import Method, make_method

log = logging.getLogger("neuroal_jax")


@dataclass(frozen=True)
class SettledRun:
    """What a run works on.

    Attributes:
        asked: The options as the user gave them.
        config: The options, with everything resolved that depends on the model or the machine.
        checkpoint: The opened model.
        method: How weights are chosen.
        budget: How many go.
        given: The allocation of a file, if one was named.
        stage_sizes: Number of candidates of each stage of the search; empty without a search.
        devices: What work is divided over; of a dry run those of them that are here.
        helpers: Other processes, which take part in the search; None: there are none.
    """

    asked: PruneConfig
    config: PruneConfig
    checkpoint: Checkpoint
    method: Method
    budget: Budget
    given: Allocation | None
    stage_sizes: list[int]
    devices: Devices
    helpers: Helpers | None = None

    @property
    def processes(self) -> int:
        """How many processes there are."""
        return 1 if self.helpers is None else len(self.helpers.devices)


def settle(asked: PruneConfig) -> SettledRun:
    """Opens the model and settles what depends on it or on the machine.

    Raises:
        UserError: If the model or an allocation file cannot be used.
    """
    config, checkpoint = asked, open_checkpoint(asked.model)
    if config.kept_of is not None:
        _check_widths(config.kept_of, checkpoint)
    given, sparsity = _given(config, checkpoint)
    stage_sizes: list[int] = []
    if given is None:
        code = ALLOCATIONS.module(config.allocation)
        changes = config.changed_by_pattern()
        if changes:
            config = replace(config, **changes)
            settled = ", ".join(f"{flag(name)} {'none' if value == () else value}" for name, value in changes.items())
            log.info("%s: the search goes on with %s", config.rows_alike, settled)
        if ALLOCATIONS[config.allocation].hurts_updates and config.refine_updates and not config.search_refine:
            message = (
                "--allocation %s was decided without --refine %s and hurts it: --allocation uniform is better here"
            )
            log.warning(message, config.allocation, config.refine)
        stage_sizes = code.stage_sizes(config.plain(), sparsity) if hasattr(code, "stage_sizes") else []
    if config.dtype == AUTO:
        on_cpu = jax.default_backend() == "cpu" and config.device_memory is None
        config = replace(config, dtype="float32" if on_cpu else checkpoint.dtype)
    config = replace(config, out=config.directory, save_model=config.model_directory)
    method = make_method(config.pruner, config.refine, config.plain())
    budget = Budget(checkpoint.linear_shapes(), checkpoint.num_blocks, sparsity, config.budget, method.pattern)
    return SettledRun(asked, config, checkpoint, method, budget, given, stage_sizes, own_devices(config))


def own_devices(config: PruneConfig) -> Devices:
    """What this process divides work over; under Slurm, what the others of its node leave to it.

    Raises:
        UserError: If there are fewer than were asked for.
    """
    wanted = None if config.devices == ALL or config.dry_run else int(config.devices)
    return devices(wanted, *(neighbours(os.environ) if config.distributed == AUTO else (0, 1)))


def _check_widths(asked: KeptOf, checkpoint: Checkpoint) -> None:
    """Raises UserError for a linear whose inputs are no whole number of groups."""
    for name, (_, linear) in checkpoint.prunable().items():
        width = checkpoint.linear_shapes()[linear][1]
        if width % asked.size:
            raise UserError(
                f"--pattern {asked}: {name} has {width} inputs, which is no multiple of {asked.size}: use another "
                "pattern, or none"
            )


def _given(config: PruneConfig, checkpoint: Checkpoint) -> tuple[Allocation | None, float]:
    """The allocation of a file, if one was named, and the share of weights to remove."""
    given, requested = None, None
    if config.allocation not in ALLOCATIONS:
        shapes = checkpoint.linear_shapes()
        path, names = Path(config.allocation), checkpoint.prunable()
        given, requested = load_allocation(path, names, shapes, checkpoint.num_blocks)
        requested = requested or mean_sparsity(given, shapes)
        if not config.by_row and any(isinstance(s, np.ndarray) for block in given.blocks for s in block.values()):
            raise UserError(
                f"--allocation {config.allocation} lists rows, but {config.rows_alike}: use an allocation of NeuroAL's "
                "block step"
            )
        asked = config.kept_of
        if asked is not None and asked.sparsity is not None:
            values = np.concatenate([np.ravel(s) for block in given.blocks for s in block.values()])
            if np.any(np.abs(values - asked.sparsity) > 1e-6):
                raise UserError(
                    f"--pattern {asked} prunes {asked.sparsity:g} of every linear, --allocation {config.allocation} "
                    f"from {values.min():g} to {values.max():g}: use --pattern auto:{asked.size}"
                )
    sparsity = config.sparsity or requested
    if sparsity is None or not 0 < sparsity < 1:
        raise UserError(f"--allocation {config.allocation} has the mean sparsity {sparsity}: give --sparsity")
    return given, sparsity
