"""Reading files that someone else wrote: within bounds, strictly, and never while they change. Imports no JAX."""

import errno
import json
import math
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from neuroal_jax.errors import UserError

INFINITE = "inf"  # what stands in JSON, which has no infinity, for a number beyond a float's range
_DEEPEST = 64  # levels of nesting; what is deeper ends in a RecursionError here or there
_LARGEST = sys.float_info.max
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

# How much a compressed file may hold: text shrinks to a third or a tenth, a decompression bomb to a thousandth.
_MOST_EXPANSION = 20
_ALWAYS_ALLOWED = 64 * 2**20


def read_json(path: Path, limit: int) -> Any:
    """The value of a JSON file of at most `limit` bytes.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is too large or not strict JSON in UTF-8, see `parse_json`.
    """
    return parse_json(read_bounded(path, limit).decode())


def read_bounded(path: Path, limit: int) -> bytes:
    """A file's bytes; raises ValueError if there are more than `limit`, OSError if it cannot be read."""
    with open_plain(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"is larger than {limit} bytes")
    return content


def open_plain(path: Path, buffering: int = -1) -> BinaryIO:
    """Opens a file to read its bytes; raises OSError for a FIFO or a device too, which may have no end, or no start."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, f"is {what_is(path)}, expected a file", str(path))
    return open(path, "rb", buffering, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def what_is(path: Path) -> str:
    """What stands at a path, in words."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "a link to nowhere" if os.path.islink(path) else "missing"
    return _KINDS.get(stat.S_IFMT(mode), "no file")


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: If it is not JSON, names a key twice, or is not `plain`.
    """
    try:
        return plain(json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant))
    except RecursionError:
        raise ValueError(f"nests deeper than {_DEEPEST} levels") from None


def plain(value: Any) -> Any:
    """A value that a parser made of JSON or YAML, as it is.

    Raises:
        ValueError: If it nests too deeply, or holds a number beyond a float's range, infinity or NaN.
    """
    _check_plain("it", value, _DEEPEST)
    return value


def _check_plain(name: str, value: Any, levels: int) -> None:
    """Raises ValueError as `plain`; `name` is the key that a value stands below, and `levels` may nest from here on."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is a number beyond a float's range")  # 1e999, or .inf and .nan of YAML
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"{name} is a whole number of {value.bit_length()} bits, beyond a float's range")
    if not isinstance(value, dict | list | tuple | set):
        return
    if levels == 0:
        raise ValueError(f"nests deeper than {_DEEPEST} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain("a key", key, levels - 1)
            _check_plain(str(key), item, levels - 1)
    else:
        for item in value:
            _check_plain(name, item, levels - 1)


def number(value: Any) -> float:
    """A number of a JSON file that this package wrote, where text stands for infinity (see `files.writing`).

    Raises:
        TypeError: If it is none.
    """
    if value == INFINITE:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} appears twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def allowed_size(path: Path) -> int:
    """How many bytes the content of a compressed file may take in memory."""
    return _ALWAYS_ALLOWED + _MOST_EXPANSION * path.stat().st_size


@dataclass(frozen=True)
class SteadyFile:
    """A file that has to stay as it was when the run began: it is read piece by piece, over hours perhaps.

    Plain reads, not a memory map: a map of a file that becomes shorter ends the process.
    """

    path: Path
    stamp: tuple[int, int, int]

    @classmethod
    def at(cls, path: Path) -> "SteadyFile":
        """The file as it is now; raises UserError if it cannot be read."""
        try:
            with open_plain(path) as file:
                return cls(path, _stamp(os.fstat(file.fileno())))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error

    def read(self, offset: int, size: int) -> bytearray:
        """`size` bytes of the file.

        Raises:
            UserError: If the file cannot be read or is not what it was.
        """
        found = bytearray(size)
        try:
            with open_plain(self.path, buffering=0) as file:
                file.seek(offset)
                complete = _fill(file, memoryview(found))
                steady = complete and _stamp(os.fstat(file.fileno())) == self.stamp
        except OSError as error:
            raise UserError(f"{self.path} cannot be read any more ({error.strerror})") from error
        if not steady:
            raise self._changed()
        return found

    def check(self) -> None:
        """Raises UserError if the file is not what it was."""
        try:
            steady = _stamp(os.stat(self.path)) == self.stamp
        except OSError as error:
            raise UserError(f"{self.path} cannot be read any more ({error.strerror})") from error
        if not steady:
            raise self._changed()

    def _changed(self) -> UserError:
        return UserError(f"{self.path} changed while it was in use: start again when nothing writes to it")


def check_steady(files: Iterable[SteadyFile]) -> None:
    """Raises UserError for the first file that is not what it was."""
    for file in files:
        file.check()


def _fill(file: BinaryIO, buffer: memoryview) -> bool:
    """Reads until the buffer is full; false if the file ends before."""
    while buffer:
        count = file.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            return False
        buffer = buffer[count:]
    return True


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    # The last is the time that no one can set back: a change is found whatever a tool does to the others.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
