"""Files that appear whole or not at all.

JSON has no infinity: where a number is beyond a float's range, the text "inf" stands for it in all files of this
package and in the data of its reports; `files.reading.number` reads it back. NaN is never written.
"""

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import INFINITE


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
    """Writes a file whole or not at all; bytes of a path that are no text are written as escapes."""
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Writes an object as JSON that people can read and NaN cannot enter."""
    path.write_text(_json(value))


def strict(value: Any) -> Any:
    """A value as strict JSON has it: with text in place of infinity."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    infinite = isinstance(value, float) and math.isinf(value)
    return (INFINITE if value > 0 else f"-{INFINITE}") if infinite else value


def _json(value: Any) -> str:
    return json.dumps(strict(value), indent=1, allow_nan=False) + "\n"


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
