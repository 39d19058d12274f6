"""A run of several processes: which they are, what they must have alike, and what all but the first one do."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import jax
import numpy as np

from neuroal_jax.command.config import PruneConfig
from neuroal_jax.command.values import AUTO, group
from neuroal_jax.machine import slurm
from neuroal_jax.machine.group import Group
from neuroal_jax.machine.memory import LOWER, exhaustion_explained, freed_memory_kept
from neuroal_jax.machine.processes import Link, Waiting, introduce, linked
from neuroal_jax.run.identity import alike
from neuroal_jax.run.progress import stage
from neuroal_jax.run.settle import SettledRun, own_devices, settle
from neuroal_jax.search.shared import Helpers, help_with
from neuroal_jax.search.walked import WalkedModel
from neuroal_jax.walk.blocks import Blocks

log = logging.getLogger("neuroal_jax")


def group_of(config: PruneConfig) -> Group | None:
    """The processes of a run; None where there is one.

    Under Slurm, processes of one node share its accelerators: JAX then sees this one's own. To be called before JAX
    looks for devices.

    Raises:
        UserError: If `auto` finds no processes.
    """
    if config.distributed is None:
        return None
    if config.distributed != AUTO:
        found = group("distributed", config.distributed)
    else:
        found = slurm.group(os.environ)
        own = slurm.own_accelerators(os.environ)
        if own is not None:
            for option in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
                jax.config.update(option, ",".join(map(str, own)))
    return found if found.processes > 1 else None


@contextmanager
def on_own_devices(config: PruneConfig) -> Iterator[None]:
    """Has JAX make arrays on the first of this process's devices, where it shares virtual ones of a CPU with others."""
    before = jax.config.values["jax_default_device"]
    if config.distributed == AUTO:
        jax.config.update("jax_default_device", own_devices(config).every[0])
    try:
        yield
    finally:
        jax.config.update("jax_default_device", before)


def gather(settled: SettledRun, waiting: Waiting, weights: str) -> SettledRun:
    """The run of the first process, once the others are here; `weights` is the SHA-256 of the model's.

    Raises:
        UserError: If one of them does not come, or has other options, another model, or other software.
    """
    told = waiting.gather(alike(settled, weights))
    counts = [len(settled.devices), *(int(of_other["devices"]) for of_other in told)]
    log.info("%d processes with %s devices", len(counts), ", ".join(map(str, counts)))
    if not settled.stage_sizes:
        log.warning("--distributed divides searches, and --allocation %s has none", settled.config.allocation)
    return replace(settled, helpers=Helpers(waiting.links, counts))


def begin_search(helpers: Helpers, batch: int, search_set: np.ndarray, fitted: np.ndarray | None) -> None:
    """Sends the other processes what all candidates have in common; `batch`: sequences per compiled call."""
    helpers.begin({"batch": batch}, {"search set": search_set, **({} if fitted is None else {"fitted": fitted})})


def help_first(config: PruneConfig, group: Group) -> None:
    """All that another process does: it scores candidates for the first one, says and writes nothing.

    Raises:
        UserError: If something cannot be used here, or the first process ended with one.
        KeyboardInterrupt: If the first process is gone.
    """
    with linked(group) as link, exhaustion_explained(LOWER), _quiet():
        settled = settle(config)
        checkpoint = settled.checkpoint
        budget = replace(settled.budget, zeros=checkpoint.zeros())
        introduce(link, alike(settled, checkpoint.hashes()["model"]), devices=len(settled.devices))
        with freed_memory_kept() if jax.default_backend() == "cpu" else nullcontext():
            _score_for(link, replace(settled, budget=budget))
        checkpoint.check_unchanged()


def _score_for(link: Link, settled: SettledRun) -> None:
    message = link.receive()
    if "end" in message.facts:  # a run that does not search
        return
    search_set = message.arrays["search set"]
    blocks = Blocks(settled.checkpoint, settled.config.dtype, message.facts["batch"], devices=settled.devices)
    model = WalkedModel(
        blocks,
        settled.method,
        settled.budget,
        settled.config.objective,
        calibration=search_set,
        search_set=search_set,
        candidate_batch=1,
        stage=stage,
        fitted=message.arrays.get("fitted"),
    )
    help_with(link, model.score_here)


@contextmanager
def _quiet() -> Iterator[None]:
    """What every process would say, only the first one does."""
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
