"""What the state of an interrupted run belongs to."""

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
from neuroal_jax.version import __version__


def identify(
    config: PruneConfig,
    sparsity: float,
    checkpoint: Checkpoint,
    calibration: Windows,
    evaluations: Mapping[str, Windows],
) -> dict[str, Any]:
    """All that a run's result depends on, by names for people: options, model, token ids, software, device."""
    options = {flag(name): value for name, value in config.material().items()}
    files = (path for path in checkpoint.path.rglob("*") if path.suffix in (".safetensors", ".json") and path.is_file())
    if not list(checkpoint.path.glob("*.safetensors")):  # Orbax
        files = (path for path in (checkpoint.path / "params").rglob("*") if path.is_file())
    states = {str(path.relative_to(checkpoint.path)): path.stat() for path in files}
    given = {}
    if os.path.isfile(config.allocation):
        given["the SHA-256 of the file --allocation"] = hashlib.sha256(Path(config.allocation).read_bytes()).hexdigest()
    return {
        **options,
        "--sparsity": sparsity,
        **given,
        "the SHA-256 of the calibration tokens": calibration.sha256,
        **{f"the SHA-256 of the tokens of {name}": windows.sha256 for name, windows in evaluations.items()},
        "the SHA-256 of the model's config.json": hashlib.sha256(
            (checkpoint.path / "config.json").read_bytes()
        ).hexdigest(),
        **{
            f"bytes and time of the model's {name}": [state.st_size, state.st_mtime_ns]
            for name, state in sorted(states.items())
        },
        "the version of neuroal_jax": __version__,
        "the version of jax": jax.__version__,
        "the version of jaxlib": jax.lib.__version__,
        "the device": jax.local_devices()[0].device_kind,
    }
