"""The persistent cache of compiled programs: a second run of the same kind starts at once."""

import logging
import os
from pathlib import Path

import jax

from neuroal_jax.command.config import AUTO

log = logging.getLogger("neuroal_jax")

_LEAST_SECONDS = 0.2  # what compiles faster is not worth a file


def use_cache(choice: str) -> None:
    """Makes JAX keep compiled programs in a directory.

    Args:
        choice: A directory; `auto`: the one that JAX was told to use, or else the user's cache directory; `none`.
    """
    if choice == "none" or (choice == AUTO and jax.config.values.get("jax_compilation_cache_dir")):
        return
    directory = user_cache() if choice == AUTO else Path(choice)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.info("compiled programs are not kept: %s cannot be written (%s)", directory, error.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def user_cache() -> Path:
    """`neuroal-jax/compiled` in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "neuroal-jax" / "compiled"
