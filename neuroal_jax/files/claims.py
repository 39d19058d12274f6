"""One process at a time writes to a place: a lock beside it, which the system lifts however its holder ends."""

import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from neuroal_jax.errors import UserError

_FORMAT = "neuroal-lock-1"
_BYTES = 512  # of a lock
_LONGEST = 180  # bytes of a name to which more is added: file systems allow 255
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS)


class Claim:
    """A place that this process alone writes to.

    Attributes:
        token: Names what an earlier holder, which was killed, left half-written there; empty if nothing.
    """

    def __init__(self, target: Path, flag: str) -> None:
        self._target, self._flag, self.token = target, flag, ""
        self._descriptors: list[int] = []
        self._lock: Path | None = None

    def note(self, token: str) -> None:
        """Writes down, for who comes after a kill, how what is half-written is named."""
        if self._lock is None:
            return
        content = {"format": _FORMAT, "process": os.getpid(), "host": socket.gethostname(), "token": token}
        # Of one length, in one call: who reads it meanwhile sees the old or the new.
        os.pwrite(self._descriptors[0], json.dumps(content).encode().ljust(_BYTES), 0)

    def check(self) -> None:
        """Raises UserError if the place is not this process's any more: someone removed the lock."""
        if self._lock is not None and not _is_at(self._descriptors[0], self._lock):
            raise UserError(f"{self._flag} {self._target}: its lock {self._lock} was removed while this process wrote")

    def _take(self) -> None:
        lock = beside(self._target, ".lock")
        while self._lock is None:
            try:
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                if error.errno not in _NO_PLACE:
                    raise
                break  # another user's, or nothing can be made there: the directory's own lock has to do
            self._descriptors.append(descriptor)
            self._flock(descriptor)
            content = os.pread(descriptor, _BYTES, 0)
            found = _parse(content)
            if content and not found:
                raise UserError(f"{self._flag} {self._target}: {lock} is no lock of this program: move it away")
            if _is_at(descriptor, lock):
                self._lock, self.token = lock, str(found.get("token", ""))
                self.note("")
            else:  # its holder ended, and removed it, between the two calls
                os.close(self._descriptors.pop())
        if os.path.isdir(self._target):  # the same directory may have another name, beside which lies another lock
            self._descriptors.append(os.open(self._target, os.O_RDONLY))
            self._flock(self._descriptors[-1])

    def _flock(self, descriptor: int) -> None:
        """Raises UserError if another process has the lock; does nothing where the file system has none."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise UserError(
                    f"{self._flag} {self._target}: {_holder(descriptor)} is writing there: wait for its end, or choose "
                    "another place"
                ) from error

    def _release(self) -> None:
        if self._lock is not None and _is_at(self._descriptors[0], self._lock):
            with suppress(OSError):
                self._lock.unlink()
        for descriptor in self._descriptors:
            os.close(descriptor)


@contextmanager
def claimed(target: Path, flag: str) -> Iterator[Claim]:
    """Keeps other processes, and other threads of this one, from writing to a file or directory meanwhile.

    Where neither a lock beside it nor one of the directory can be had, nothing is kept.

    Args:
        target: The place, whose parent exists.
        flag: The command's flag for it, for messages.

    Raises:
        UserError: Naming the process that writes there.
    """
    claim = Claim(Path(os.path.realpath(target)), flag)
    try:
        claim._take()
        yield claim
    finally:
        claim._release()


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


def beside(target: Path, suffix: str) -> Path:
    """A hidden name beside a target, as long as file systems allow: `.NAME.SUFFIX`, a long name with its hash."""
    absolute = Path(os.path.abspath(target))
    name = os.fsencode(absolute.name)
    if len(name) > _LONGEST:
        name = name[: _LONGEST - 20] + b"-" + hashlib.sha256(name).hexdigest()[:16].encode()
    return absolute.parent / f".{os.fsdecode(name)}{suffix}"


def _holder(descriptor: int) -> str:
    """Who has a lock; a holder that began this very moment may not have said so yet."""
    for _ in range(20):
        with suppress(OSError):  # of a directory
            found = _parse(os.pread(descriptor, _BYTES, 0))
            if found:
                return f"process {found['process']} on {found['host']}"
            time.sleep(0.01)
    return "another process"


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _parse(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
        known = found["format"] == _FORMAT and isinstance(found["process"], int) and isinstance(found["host"], str)
        return found if known else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
