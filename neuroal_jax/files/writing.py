"""Files that appear whole or not at all.

JSON has no infinity: where a number is beyond a float's range, the text "inf" stands for it in all files of this
package and in the data of its reports; `files.reading.number` reads it back. NaN is never written.
"""

import json
import math
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from neuroal_jax.errors import UserError
from neuroal_jax.files.claims import claimed
from neuroal_jax.files.protection import Inputs
from neuroal_jax.files.reading import INFINITE, read_json

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in safetensors' messages
_MOST_BYTES = 2**30  # of a result; those with every row's prediction are large


def spilled(array: np.ndarray, path: Path) -> np.ndarray:
    """Writes an array to a file and gives back a read-only view of that file."""
    with naming(path):
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(path)
    return np.memmap(path, np.uint8, "r").view(array.dtype).reshape(array.shape)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields another name to write to; on success that file replaces `path`, on any failure it is removed."""
    part = path.with_name(f".{path.name[:99]}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        part.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all; bytes of a path that are no text are written as escapes."""
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Writes an object as JSON that people can read and NaN cannot enter."""
    with naming(path):
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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives the system's errors in writing a file its name, where they have none."""
    try:
        yield
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        code = int(found[1]) if found else None
        raise OSError(code, os.strerror(code) if code else str(error), str(path)) from error
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def new_json(
    path: Path | None, *, format: str, overwrite: bool, inputs: Inputs, flag: str = "--out"
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields the function that writes a program's result, whole or not at all; without a path it does nothing.

    No other process writes to the file meanwhile.

    Args:
        path: The file, in a directory that exists.
        format: What the result says under `format`: of what is there, only that may be replaced.
        overwrite: Whether to replace an earlier result.
        inputs: What the program reads, of which nothing may be replaced.
        flag: The command's flag for the file, for messages.

    Raises:
        UserError: Before any work, and again when it is written, if the file cannot be written, or would replace
            anything but an earlier result.
    """
    if path is None:
        yield lambda value: None
        return
    _check_new_file(path, format, overwrite, inputs, flag)
    with claimed(path, flag) as claim:

        def write(value: Mapping[str, Any]) -> None:
            claim.check()
            _check_new_file(path, format, overwrite, inputs, flag)
            try:
                replace_text(path, _json(value))
            except OSError as error:
                raise UserError(f"{flag} {path} cannot be written ({error.strerror})") from error

        yield write


def _check_new_file(path: Path, format: str, overwrite: bool, inputs: Inputs, flag: str) -> None:
    if os.path.isdir(path):
        raise UserError(f"{flag} {path} is a directory, expected a file")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{flag} {path} exists already: pass --overwrite to replace it")
    if not os.path.isdir(path.parent):
        raise UserError(f"{flag} {path}: there is no directory {path.parent}")
    if os.path.lexists(path):
        inputs.protect([path], flag)
        if not has_format(path, format):
            raise UserError(
                f"{flag} {path} exists, and is no earlier result of this program ({format}): move it away, or choose "
                "another file"
            )


def has_format(path: Path, format: str) -> bool:
    """Whether a path is a JSON file that says that it is of a format."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        content = read_json(path, _MOST_BYTES)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == format
