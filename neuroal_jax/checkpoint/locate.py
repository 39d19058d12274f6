"""Where a model lies: the embedded demo, a directory, or the Hugging Face Hub. Imports no JAX."""

import os
import re
from pathlib import Path

from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import what_is

DEMO = Path(__file__).parents[1] / "demo"
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.model", "*.txt"]


def locate(model: str, flag: str = "--model") -> Path:
    """The local directory of a model: `demo`, a path, or a Hub id (downloaded to the Hub's own cache).

    Raises:
        UserError: If there is none. The message says `flag`.
    """
    if model == "demo":
        return DEMO
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):  # unlike Path.is_dir, false for a name that is too long
        for name in ("config.json", "model.safetensors", "model.safetensors.index.json"):
            if os.path.lexists(path / name) and not (path / name).is_file():
                raise UserError(f"{path / name} is {what_is(path / name)}, expected a file: download the model again")
        return path
    if os.path.lexists(path):
        raise UserError(f"{flag} {model} is {what_is(path)}, expected a checkpoint directory")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise UserError(f"{flag} {model}: no such directory, and not a Hugging Face model id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{flag} {model}: no such directory, and the Hugging Face Hub says: {reason}") from error
