"""The persistent cache of compiled programs: a second run of the same kind starts at once."""

import logging
import os
import tempfile
from pathlib import Path

import jax

log = logging.getLogger("neuroal_jax")

_LEAST_SECONDS = 0.2  # what compiles faster is not worth a file


def use_default_cache() -> None:
    """Makes JAX keep compiled programs in the user's cache directory, if it was not told to keep them elsewhere."""
    if not jax.config.values.get("jax_compilation_cache_dir"):
        use_cache(user_cache())


def use_cache(directory: Path) -> None:
    """Makes JAX keep compiled programs in a directory; says so and goes on without where it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
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
