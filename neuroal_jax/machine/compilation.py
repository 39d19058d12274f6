"""Compiled programs: kept in files, so that a second run of the same kind starts at once, and forgotten in time."""

import logging
import os
import tempfile
from pathlib import Path

import jax

log = logging.getLogger("neuroal_jax")

_LEAST_SECONDS = 0.2  # what compiles faster is not worth a file
_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
_ROOM = 0.5  # of the memory maps that a process may have; a run takes some thousands


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


def make_room() -> None:
    """Forgets the programs of earlier runs in this process before there are too many.

    On a CPU each program takes several of the memory maps that Linux allows a process; without one more, compiling
    would end the process. What is needed again comes from the persistent cache, or is compiled again.
    """
    try:
        maps, limit = _MAPS[0].read_bytes().count(b"\n"), int(_MAPS[1].read_text())
    except (OSError, ValueError):  # another system
        return
    if maps > _ROOM * limit:
        jax.clear_caches()
