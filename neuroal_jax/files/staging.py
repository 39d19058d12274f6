"""Directories that appear whole or not at all."""

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from neuroal_jax.errors import UserError
from neuroal_jax.machine.interrupts import held
from neuroal_jax.machine.memory import is_exhausted


@contextmanager
def staged(target: Path, *, overwrite: bool, marker: str, flag: str, stale: str | None = None) -> Iterator[Path]:
    """Yields a hidden directory beside `target`; on success its files move into `target`, on any failure it is removed.

    Args:
        target: The final directory, created if needed. Files in it that this run does not write are left alone.
        overwrite: Whether a `target` that already holds `marker` may be replaced.
        marker: The file that tells a complete result; it moves last.
        flag: The command's flag for `target`, for messages.
        stale: Pattern of files of an older result that must not stay beside the new ones.

    Raises:
        UserError: If `target` holds a result already, or nothing can be written there.
    """
    _check_target(target, flag)
    if os.path.exists(target / marker) and not overwrite:
        raise UserError(f"{flag} {target} already holds a result ({marker}): pass --overwrite to replace it")
    replacing = os.path.exists(target / marker)
    made = _missing_parents(target)
    # Beside a new target, inside one that exists: it may be a mount point, and files move within a file system only.
    place = target if os.path.isdir(target) else target.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name[:99]}.", suffix=".partial", dir=place))
        owner = take(staging)
    except OSError as error:
        _remove_empty(made)
        raise UserError(f"{flag} {target} cannot be written ({error.strerror}): choose another directory") from error
    try:
        yield staging
        with held(f"{target} was written before"):
            _publish(staging, target, marker, stale if replacing else None)
    except BrokenPipeError:  # of stdout
        raise
    except (OSError, SafetensorError) as error:  # a full disk, a directory in the way, a target that vanished
        if is_exhausted(error):
            raise
        raise UserError(f"{flag} {target} cannot be written ({error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)
        if owner is not None:
            os.close(owner)


def take(directory: Path) -> int | None:
    """Marks a directory as this process's own, until the descriptor is closed or the process ends, however it ends.

    None if another process has it, or the file system has no such locks.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def remove_leftovers(target: Path) -> None:
    """Removes what killed processes left half-written for `target`."""
    for place in (target, target.absolute().parent):
        for leftover in place.glob(f".{glob.escape(target.name[:99])}.*.partial"):
            if leftover.is_dir() and (owner := take(leftover)) is not None:
                shutil.rmtree(leftover, ignore_errors=True)
                os.close(owner)


def _check_target(target: Path, flag: str) -> None:
    if os.path.exists(target) and not os.path.isdir(target):
        raise UserError(f"{flag} {target} is a file, expected a directory")
    if os.path.islink(target) and not os.path.exists(target):
        raise UserError(f"{flag} {target} is a link to nowhere, expected a directory")
    try:
        os.lstat(target)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{flag} {target} cannot be written ({error.strerror}): choose another directory") from error


def _publish(staging: Path, target: Path, marker: str, stale: str | None) -> None:
    allowed = _default_permissions(staging)
    staging.chmod(allowed)  # mkdtemp and safetensors make private files
    for path in staging.rglob("*"):
        path.chmod(allowed if path.is_dir() else allowed & 0o666)
    if not target.is_dir():
        staging.rename(target)
        return
    (target / marker).unlink(missing_ok=True)
    for path in target.glob(stale) if stale else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name == marker):
        if path.is_dir() and (target / path.name).is_dir():  # its makers asked before; a full directory is no target
            shutil.rmtree(target / path.name)
        path.replace(target / path.name)


def _default_permissions(directory: Path) -> int:
    """The permissions of a new directory in `directory`, as the user's umask allows them.

    Made and looked at: to ask the system for the umask is to set it, for all threads of the process.
    """
    example = directory / ".permissions"
    example.mkdir()
    try:
        return example.stat().st_mode & 0o777
    finally:
        example.rmdir()


def _missing_parents(target: Path) -> list[Path]:
    return [parent for parent in target.absolute().parents if not os.path.exists(parent)]


def _remove_empty(parents: list[Path]) -> None:
    for parent in parents:
        try:
            parent.rmdir()
        except OSError:
            return
