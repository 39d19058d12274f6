"""Where a model lies: the embedded demo, a directory, or the Hugging Face Hub. Imports no JAX."""

import os
import re
from pathlib import Path

from neuroal_jax.checkpoint.listing import SAFETENSORS, WeightFiles, check_listing, hub_patterns
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import what_is

DEMO = Path(__file__).parents[1] / "demo"


def locate(model: str, flag: str = "--model", weights: WeightFiles = SAFETENSORS) -> Path:
    """The local directory of a model: `demo`, a path, or a Hub id (downloaded to the Hub's own cache).

    Of a repository on the Hub, the files that belong to the model are downloaded, and its weights in one form.

    Raises:
        UserError: If there is none. The message says `flag`.
    """
    if model == "demo":
        return DEMO
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):  # unlike Path.is_dir, false for a name that is too long
        for name in ("config.json", weights.single, weights.index):
            if os.path.lexists(path / name) and not (path / name).is_file():
                raise UserError(f"{path / name} is {what_is(path / name)}, expected a file: download the model again")
        return path
    if os.path.lexists(path):
        raise UserError(f"{flag} {model} is {what_is(path)}, expected a checkpoint directory")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise UserError(f"{flag} {model}: no such directory, and not a Hugging Face model id (owner/name)")
    try:
        return _download(model, weights)
    except UserError:
        raise
    except Exception as error:  # of the Hub's client, which raises many kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{flag} {model}: no such directory, and the Hugging Face Hub says: {reason}") from error


def _download(model: str, weights: WeightFiles) -> Path:
    """The snapshot of a repository in the Hub's cache, completed if the Hub can be reached."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        names = [file.rfilename for file in HfApi().model_info(model).siblings or ()]
    except Exception as error:  # offline, or not allowed any more: what is in the cache will do
        allowed, ignored = hub_patterns(weights)
        needed = ["config.json", weights.single, weights.index, weights.shards]
        for patterns in (allowed, needed):
            try:
                found = snapshot_download(
                    model, allow_patterns=patterns, ignore_patterns=ignored, local_files_only=True
                )
                return Path(found)
            except LocalEntryNotFoundError:
                continue
        raise error
    check_listing(names, weights, model)
    allowed, ignored = hub_patterns(weights, names)
    return Path(snapshot_download(model, allow_patterns=allowed, ignore_patterns=ignored))
