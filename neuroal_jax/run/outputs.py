"""What a run writes: masks, allocation, manifest, report, and the pruned model."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from neuroal_jax.command.config import PruneConfig
from neuroal_jax.errors import UserError
from neuroal_jax.files.staging import staged
from neuroal_jax.files.writing import replace_text, spilled
from neuroal_jax.masks.file import PackedMasks
from neuroal_jax.report.page import REPORT, run_report
from neuroal_jax.run.compute import PrunedModel
from neuroal_jax.run.settle import SettledRun
from neuroal_jax.version import __version__
from neuroal_jax.walk.final import MoveUpdated

log = logging.getLogger("neuroal_jax")

MASKS, ALLOCATION, MANIFEST, MODEL = "masks.safetensors", "allocation.json", "manifest.json", "model"


def stage_results(config: PruneConfig, stack: ExitStack) -> tuple[Path, Path | None]:
    """Hidden directories that become the results and the saved model when `stack` ends well.

    Raises:
        UserError: If there is a result already, or nothing can be written there.
    """
    target = Path(config.out or "")
    stale = MODEL if _holds_a_model(target) else None
    staging = staged(target, overwrite=config.overwrite, marker=MANIFEST, flag="--out", stale=stale)
    out = stack.enter_context(staging)
    return out, _stage_model(config, out, stack)


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


def _holds_a_model(target: Path) -> bool:
    """Whether an earlier run wrote its pruned model into `target`; it must not stay beside the masks of this one."""
    try:
        saved = json.loads((target / MANIFEST).read_text())["options"]["save_model"]
        return os.path.realpath(saved) == os.path.realpath(target / MODEL)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def move_to_files(directory: Path) -> MoveUpdated:
    """Moves updated weights to files, so that host memory holds one block of them."""

    def move(block: int, updated: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: spilled(array, directory / f"{block}.{name}") for name, array in updated.items()}

    return move


def pack_masks(settled: SettledRun, pruned: PrunedModel, source: str) -> PackedMasks:
    """The masks of all blocks under their Hugging Face names; `source` is the SHA-256 of the prunable weights."""
    packed, widths, kept_zeros = {}, {}, {}
    for name, (block, linear) in settled.checkpoint.prunable().items():
        packed[name] = pruned.blocks[block].packed[linear]
        widths[name] = settled.budget.shapes[linear][1]
        if pruned.blocks[block].kept_zeros[linear]:
            kept_zeros[name] = pruned.blocks[block].kept_zeros[linear]
    config = settled.config
    method = f"{config.pruner} + {pruned.allocation.method}"
    run = {
        "method": method if config.refine == "none" else f"{method} + {config.refine}",
        "weights": "updated" if settled.method.updates_weights else "kept",
        "budget": config.budget,
        "sparsity": repr(settled.budget.sparsity),
        "neuroal_jax": __version__,
    }
    return PackedMasks(packed, widths, kept_zeros, source, run)


def edit_of(
    names: Mapping[str, tuple[int, str]], pruned: PrunedModel, masks: PackedMasks
) -> Callable[[str, np.ndarray], np.ndarray]:
    """What to store in place of a tensor: its updated weights, or itself with zeros."""

    def edit(name: str, weight: np.ndarray) -> np.ndarray:
        block, linear = names[name]
        updated = pruned.blocks[block].updated
        return updated[linear] if updated else masks.prune(name, weight)

    return edit


def write_report(directory: Path, manifest: Mapping[str, Any], allocation: Mapping[str, Any]) -> None:
    """Writes the report; one that cannot be drawn is only mentioned, it must not cost the hours behind its numbers."""
    try:
        page = run_report(manifest, allocation)
    except Exception as error:
        log.warning("no %s was made (%r): see 'python -m neuroal_jax.report'", REPORT, error)
        return
    replace_text(directory / REPORT, page)
