"""What the state of an interrupted run belongs to, and what runs measured for each other."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from neuroal_jax.checkpoint.opened import Checkpoint
from neuroal_jax.command.config import PruneConfig
from neuroal_jax.command.values import flag
from neuroal_jax.data.windows import Windows
from neuroal_jax.resume.measured import Measured
from neuroal_jax.run.settle import SettledRun
from neuroal_jax.version import __version__


def identify(
    config: PruneConfig,
    sparsity: float,
    checkpoint: Checkpoint,
    calibration: Windows,
    evaluations: Mapping[str, Windows],
    processes: int,
) -> dict[str, Any]:
    """All that a run's state depends on, by names for people: options, model, token ids, software, processes."""
    options = {flag(name): value for name, value in config.material().items()}
    # Of the model's directory only what is read: results, and the state itself, may lie in it too.
    files = [checkpoint.config_file.file, *checkpoint.source.steady]
    states = {os.path.relpath(file.path, checkpoint.path): file.stamp[:2] for file in files}
    given = {}
    if os.path.isfile(config.allocation):
        given["the SHA-256 of the file --allocation"] = hashlib.sha256(Path(config.allocation).read_bytes()).hexdigest()
    return {
        **options,
        "--sparsity": sparsity,
        **given,
        "the SHA-256 of the calibration tokens": calibration.sha256,
        **{f"the SHA-256 of the tokens of {name}": windows.sha256 for name, windows in evaluations.items()},
        "the SHA-256 of the model's config.json": checkpoint.config_file.sha256,
        **{f"bytes and time of the model's {name}": list(state) for name, state in sorted(states.items())},
        "whether there are several processes": processes > 1,
        **_software(),
    }


def alike(settled: SettledRun, weights: str) -> dict[str, Any]:
    """What all processes of a run must have alike, by names for people: options, model, software, device.

    Each may have its own copy of the model; `weights` is the SHA-256 of its weights.
    """
    return {
        **{flag(name): value for name, value in settled.config.material().items() if name != "model"},
        "--sparsity": settled.budget.sparsity,
        "the SHA-256 of the model's config.json": settled.checkpoint.config_file.sha256,
        "the SHA-256 of the weights": weights,
        **_software(),
    }


def measured_in(directory: str, run: str, checkpoint: Checkpoint, weights: str) -> Measured:
    """What runs of a model keep for each other in a directory; `weights` is the SHA-256 of all its weights."""
    common = {
        "the SHA-256 of the weights": weights,
        "the SHA-256 of the model's config.json": checkpoint.config_file.sha256,
        **_software(),
    }
    return Measured(Path(directory), common, run, checkpoint.check_unchanged)


def _software() -> dict[str, str]:
    return {
        "the version of neuroal_jax": __version__,
        "the version of jax": jax.__version__,
        "the version of jaxlib": jax.lib.__version__,
        "the device": jax.local_devices()[0].device_kind,
    }
