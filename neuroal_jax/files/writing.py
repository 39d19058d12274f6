"""Directories that appear whole or not at all."""

import fcntl
import glob
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from neuroal_jax.errors import UserError
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
    umask = os.umask(0)
    os.umask(umask)
    staging.chmod(0o777 & ~umask)  # mkdtemp and safetensors make private files
    for path in staging.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
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


def _missing_parents(target: Path) -> list[Path]:
    return [parent for parent in target.absolute().parents if not os.path.exists(parent)]


def _remove_empty(parents: list[Path]) -> None:
    for parent in parents:
        try:
            parent.rmdir()
        except OSError:
            return


def spilled(array: np.ndarray, path: Path) -> np.ndarray:
    """Writes an array to a file and gives back a read-only view of that file."""
    np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(path)
    return np.memmap(path, np.uint8, "r").view(array.dtype).reshape(array.shape)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields another name to write to; on success that file replaces `path`, on any failure it is removed."""
    part = path.with_name(f".{path.name[:99]}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes an object as JSON that people can read and NaN cannot enter."""
    path.write_text(_json(value))


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def check_new_file(path: Path, *, overwrite: bool, flag: str = "--out") -> None:
    """Raises UserError, before any work, if a file cannot be written or would replace one unasked."""
    if os.path.isdir(path):
        raise UserError(f"{flag} {path} is a directory, expected a file")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{flag} {path} exists already: pass --overwrite to replace it")
    if not os.path.isdir(path.parent):
        raise UserError(f"{flag} {path}: there is no directory {path.parent}")


def publish_json(path: Path, value: Any, flag: str = "--out") -> None:
    """Writes a JSON file whole or not at all.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        replace_text(path, _json(value))
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror})") from error
