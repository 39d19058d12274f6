"""What a run writes: masks, allocation, manifest, report, and the pruned model."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuroal_jax.allocation import ALLOCATIONS
from neuroal_jax.allocation import file as allocation_file
from neuroal_jax.data.sources import files_of
from neuroal_jax.errors import UserError
from neuroal_jax.files.protection import Inputs, same_place
from neuroal_jax.files.reading import read_json
from neuroal_jax.files.records import Earlier, compare, from_json
from neuroal_jax.files.staging import Shared, Staging, publish, staging
from neuroal_jax.files.writing import has_format, replace_text, spilled
from neuroal_jax.masks.file import PackedMasks, is_masks
from neuroal_jax.report.page import REPORT, is_report, run_report
from neuroal_jax.report.recorded import FORMAT
from neuroal_jax.run.compute import PrunedModel
from neuroal_jax.run.settle import SettledRun
from neuroal_jax.version import __version__
from neuroal_jax.walk.final import MoveUpdated

log = logging.getLogger("neuroal_jax")

MASKS, ALLOCATION, MANIFEST, MODEL = "masks.safetensors", "allocation.json", "manifest.json", "model"
_MANIFEST_BYTES = 2**30  # more than any manifest has


@dataclass(frozen=True)
class Results:
    """Where a run writes what it will publish.

    Attributes:
        out: For masks, allocation, manifest and report.
        saved: For the pruned model, if it is saved.
        scratch: For files that only the run itself needs.
    """

    out: Path
    saved: Path | None
    scratch: Path
    _stagings: tuple[Staging, ...]

    def publish(self) -> None:
        """Moves all to where it belongs, or nothing; errors as `files.staging.publish`."""
        publish(self._stagings)


@contextmanager
def stage_results(settled: SettledRun) -> Iterator[Results]:
    """Hidden directories for the results and the saved model; no other process writes to their targets meanwhile.

    Raises:
        UserError: If there is a result already, an input would be lost, or nothing can be written there.
    """
    config, inputs = settled.config, inputs_of(settled)
    if config.measured is not None and (holding := inputs.holding(Path(config.measured))):
        raise UserError(f"--measured {config.measured} lies in {holding}: choose another directory")
    target, model = Path(config.directory), config.model_directory
    own_model = model is not None and same_place(model, target / MODEL)
    names = (MASKS, ALLOCATION, MANIFEST, REPORT, *([MODEL] if own_model else []))
    shared = Shared(names, _written_before)
    with ExitStack() as stack:
        if model is not None and not own_model:
            _refuse_inside(Path(model), inputs)  # which would be found too, but less plainly
            model_staging = stack.enter_context(
                staging(
                    Path(model), overwrite=config.overwrite, marker="config.json", flag="--save-model", inputs=inputs
                )
            )
        out = stack.enter_context(
            staging(target, overwrite=config.overwrite, marker=MANIFEST, flag="--out", inputs=inputs, shared=shared)
        )
        if model is None:
            yield Results(out.path, None, out.scratch, (out,))
        elif own_model:  # appears together with the masks
            (out.path / MODEL).mkdir()
            yield Results(out.path, out.path / MODEL, out.scratch, (out,))
        else:
            yield Results(out.path, model_staging.path, out.scratch, (model_staging, out))


def inputs_of(settled: SettledRun) -> Inputs:
    """All that a run reads."""
    config = settled.config
    return Inputs(
        ("--model", settled.checkpoint.path),
        ("--allocation", None if config.allocation in ALLOCATIONS else config.allocation),
        *files_of("--calib", [config.calib]),
        *files_of("--eval", config.evaluations),
    )


def _refuse_inside(model: Path, inputs: Inputs) -> None:
    """Raises UserError if an input lies in the directory of the saved model, which holds the model alone."""
    found = inputs.within(model)
    if found is not None and not os.path.isfile(model):  # which is refused for that
        raise UserError(
            f"--save-model {model} is for the pruned model and nothing else, but {found} lies in it: choose another "
            "directory"
        )


def _written_before(directory: Path) -> Earlier:
    """What an earlier run wrote into a directory of results."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        return Earlier()
    try:
        manifest = read_json(path, _MANIFEST_BYTES)
        if path.is_symlink() or manifest["format"] != FORMAT:
            raise ValueError("it is no manifest")
        earlier = (
            compare(directory, from_json(manifest["files"])) if "files" in manifest else _older(directory, manifest)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return Earlier(changed=frozenset({MANIFEST}))
    own = {MANIFEST, *([REPORT] if is_report(directory / REPORT) else [])}  # a report may be made again
    return Earlier(earlier.ours | own, earlier.changed - own)


def _older(directory: Path, manifest: Mapping[str, Any]) -> Earlier:
    """The same, of a version whose manifests had no record: what the files say of themselves has to do."""
    ours = {MASKS} if is_masks(directory / MASKS) else set()
    ours |= {ALLOCATION} if has_format(directory / ALLOCATION, allocation_file.FORMAT) else set()
    saved, model = manifest["options"]["save_model"], directory / MODEL
    unknown = {MODEL} if saved and os.path.lexists(model) and same_place(saved, model) else set()
    return Earlier(frozenset(ours), frozenset(unknown))


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
    if config.kept_of is not None:
        run["pattern"] = config.pattern
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
