"""Directories that appear whole or not at all, and replace nothing but what an earlier run wrote.

A directory of a model holds the model alone. What is in one before must be recorded, beside it, as an earlier run's. A
directory of results may hold files of others: these stay.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from neuroal_jax.errors import UserError, shorten
from neuroal_jax.files.claims import Claim, beside, claimed
from neuroal_jax.files.protection import Inputs
from neuroal_jax.files.records import Earlier, compare, files_of, read_record, record_of, record_path, write_record
from neuroal_jax.machine.interrupts import held
from neuroal_jax.machine.memory import is_exhausted

_NEW, _OLD, _JOURNAL, _SCRATCH = "new", "old", "files.json", "scratch"
_TOKEN = re.compile(r"[0-9a-f]{8}")
_PARTIAL = re.compile(rf"/\.[^/]+\.{_TOKEN.pattern}\.partial/")
_OF_WRITING = (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class Shared:
    """What is known of a directory of results, which may hold other files too.

    Attributes:
        names: Files and directories in it that a run may write.
        earlier: What an earlier run wrote into it.
    """

    names: Collection[str]
    earlier: Callable[[Path], Earlier]


class _Target:
    """A directory to be written, and what may be replaced in it."""

    def __init__(
        self, named: Path, overwrite: bool, marker: str, flag: str, inputs: Inputs, shared: Shared | None
    ) -> None:
        self.named, self.overwrite, self.marker, self.flag = named, overwrite, marker, flag
        self.inputs, self.shared = inputs, shared
        self.real = Path(os.path.realpath(named))
        self.root: Path | None = None  # this run's own hidden directory, once it is there

    def check_kind(self) -> None:
        """Raises UserError if something other than a directory is there."""
        if os.path.islink(self.named) and not os.path.exists(self.named):
            raise UserError(f"{self.flag} {self.named} is a link to nowhere, expected a directory")
        if os.path.exists(self.named) and not os.path.isdir(self.named):
            raise UserError(f"{self.flag} {self.named} is a file, expected a directory")
        try:
            os.lstat(self.real)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self.flag} {self.named} cannot be written ({error.strerror})") from error

    def partial(self, home: Path, token: str) -> Path:
        """The hidden directory for new files."""
        return home / beside(self.real, f".{token}.partial").name

    def replaceable(self) -> list[str]:
        """The files that new ones replace, all an earlier run's, with the marker first.

        Raises:
            UserError: If there is something else that would have to go, or --overwrite is missing.
        """
        if not self.real.is_dir():
            return []
        if self.shared is None:
            earlier = compare(self.real, read_record(record_path(self.real)))
            present = set(files_of(self.real))
        else:
            earlier = self.shared.earlier(self.real)
            present = {found for name in self.shared.names for found in _files_at(self.real, name)}
            if not self.overwrite and (self.real / self.marker).exists():
                raise self._holds_a_result()
        own = None if self.root is None else self.root.name
        others = {name for name in present - earlier.ours if Path(name).parts[0] != own} | earlier.changed
        if others:
            raise UserError(
                f"{self.flag} {self.named} already holds files that no earlier run is known to have written, or that "
                f"changed since ({shorten(sorted(others))} exists already): move them away, or choose another directory"
            )
        if earlier.ours and not self.overwrite:
            raise self._holds_a_result()
        inside = {str(parent) for name in earlier.ours for parent in Path(name).parents} - {"."}
        self.inputs.protect((self.real / path for path in (*earlier.ours, *inside)), self.flag)
        return sorted(earlier.ours, key=lambda name: name != self.marker)

    def _holds_a_result(self) -> UserError:
        return UserError(
            f"{self.flag} {self.named} already holds a result ({self.marker}): pass --overwrite to replace it, "
            "or name another place"
        )

    def take_over(self, token: str) -> None:
        """Clears away what a killed process left: its half-written files go, and what they were to replace returns."""
        for home in (self.real, self.real.parent) if _TOKEN.fullmatch(token) else ():
            root = self.partial(home, token)
            if root.is_symlink() or not root.is_dir() or self.inputs.within(root):  # it may lie in a model's directory
                continue
            journal = read_record(root / _JOURNAL)
            arrived = compare(self.real, journal).ours
            if self.marker not in arrived:
                for name in arrived:
                    (self.real / name).unlink()
                _remove_empty_in(self.real, arrived)
                for name in files_of(root / _OLD):
                    if not os.path.lexists(self.real / name):
                        (self.real / name).parent.mkdir(parents=True, exist_ok=True)
                        (root / _OLD / name).rename(self.real / name)
            elif self.shared is None:
                with suppress(OSError):
                    write_record(record_path(self.real), journal)
            shutil.rmtree(root, ignore_errors=True)

    def blamed(self, error: OSError | SafetensorError) -> Exception:
        """The error for a user: it names the file that it came from; that of another target's is left to that one."""
        file = getattr(error, "filename", None)
        reason = getattr(error, "strerror", None) or str(error)
        if file is None:
            written = isinstance(error, SafetensorError) or error.errno in _OF_WRITING
            return UserError(f"{self.flag} {self.named} {'cannot be' if written else 'was not'} written ({reason})")
        path, hidden = Path(os.path.abspath(os.fsdecode(file))), beside(self.real, ".").name
        own = (*self.real.parents, self.real, Path(os.path.abspath(self.named)))
        if path in own or self.real in path.parents or any(part.startswith(hidden) for part in path.parts):
            return UserError(f"{self.flag} {self.named} cannot be written ({reason})")
        return error if _PARTIAL.search(str(path)) else UserError(f"{path}: {reason}")


@dataclass
class Staging:
    """New files for a directory.

    Attributes:
        path: Where to write them.
        scratch: An empty directory on the same file system, which goes in the end.
    """

    path: Path
    scratch: Path
    _target: "_Target"
    _claim: Claim
    _moved: list[tuple[Path, Path]] = field(default_factory=list)

    def _publish(self) -> None:
        """Moves what is new in, after what it replaces moved out: the marker goes first and comes last."""
        target, marker = self._target.real, self._target.marker
        self._claim.check()
        replaced = self._target.replaceable()
        _allow(self.path)
        write_record(self.path.parent / _JOURNAL, record_of(self.path))
        if not target.is_dir():
            self._move(self.path, target)
        else:
            for name in replaced:
                self._move(target / name, self.path.parent / _OLD / name)
            _remove_empty_in(target, replaced)
            for path in sorted(self.path.iterdir(), key=lambda path: path.name == marker):
                self._move(path, target / path.name)

    def _record(self) -> None:
        """Writes down what a model's directory holds now; where that fails, nothing in it will be replaced later."""
        if self._target.shared is None:
            with suppress(OSError):
                write_record(record_path(self._target.real), read_record(self.path.parent / _JOURNAL))

    def _move(self, old: Path, new: Path) -> None:
        new.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(new):  # a rename would replace it
            raise UserError(f"{self._target.flag} {self._target.named}: {new} exists already: move it away")
        self._moved.append((old, new))
        old.rename(new)

    def _undo(self) -> None:
        while self._moved:
            old, new = self._moved[-1]
            if os.path.lexists(new):
                old.parent.mkdir(parents=True, exist_ok=True)
                new.rename(old)
            self._moved.pop()


def publish(stagings: Iterable[Staging]) -> None:
    """Moves new files to where they belong: all of them, or none.

    Raises:
        UserError: If a directory holds anything by now that must not be replaced.
        OSError: If files cannot be moved.
    """
    stagings, begun = list(stagings), []
    with held(f"{' and '.join(str(staging._target.named) for staging in stagings)} was written before"):
        try:
            for staging in stagings:
                begun.append(staging)
                staging._publish()
        except BaseException:
            for staging in reversed(begun):
                staging._undo()
            raise
        for staging in begun:
            staging._moved.clear()
            staging._record()


@contextmanager
def staged(
    target: Path,
    *,
    overwrite: bool,
    marker: str,
    flag: str,
    inputs: Inputs | None = None,
    shared: Shared | None = None,
) -> Iterator[Path]:
    """Yields a hidden directory beside `target`; on success its files move into `target`, on any failure it is removed.

    Arguments and errors as `staging`.
    """
    with staging(target, overwrite=overwrite, marker=marker, flag=flag, inputs=inputs, shared=shared) as new:
        yield new.path
        publish([new])


@contextmanager
def staging(
    target: Path,
    *,
    overwrite: bool,
    marker: str,
    flag: str,
    inputs: Inputs | None = None,
    shared: Shared | None = None,
) -> Iterator[Staging]:
    """Room for new files of `target`, which `publish` moves there; what was not published is removed.

    No other process writes to `target` meanwhile.

    Args:
        target: The final directory, created if needed.
        overwrite: Whether a result that `target` holds already may be replaced.
        marker: The file that tells a complete result; it moves last.
        flag: The command's flag for `target`, for messages.
        inputs: What the program reads, of which nothing may be replaced.
        shared: For a directory that may hold other files too; a model's directory may not.

    Raises:
        UserError: If another process writes to `target`, if it holds a result already or anything that must not be
            replaced, or if nothing can be written there.
    """
    place = _Target(target, overwrite, marker, flag, inputs or Inputs(), shared)
    place.check_kind()
    made = [parent for parent in place.real.parents if not os.path.exists(parent)]
    # Beside a new target, inside one that exists: it may be a mount point, and files move within a file system only.
    home = place.real if os.path.isdir(place.real) else place.real.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        with claimed(place.real, flag) as claim:
            place.take_over(claim.token)
            place.replaceable()
            token = secrets.token_hex(4)
            claim.note(token)
            root = place.root = place.partial(home, token)
            new = Staging(root / _NEW, root / _SCRATCH, place, claim)
            try:
                for directory in (root, new.path, new.scratch):
                    directory.mkdir(mode=0o700)
                yield new
            finally:
                if not new._moved:  # else what was there before is in it, and could not be moved back
                    shutil.rmtree(root, ignore_errors=True)
    except BrokenPipeError:  # of stdout
        raise
    except (OSError, SafetensorError) as error:  # a full disk, a directory in the way, a target that vanished
        if is_exhausted(error):
            raise
        raise place.blamed(error) from error
    finally:
        _remove_empty(made)


def _allow(directory: Path) -> None:
    """Gives new files the permissions that the user's umask allows: mkdtemp and safetensors make private ones.

    A directory is made and looked at: to ask the system for the umask is to set it, for all threads of the process.
    """
    example = directory.parent / "permissions"
    example.mkdir()
    allowed = example.stat().st_mode & 0o777
    directory.chmod(allowed)
    for path in directory.rglob("*"):
        path.chmod(allowed if path.is_dir() else allowed & 0o666)


def _files_at(directory: Path, name: str) -> list[str]:
    """Relative paths of what lies under a name in a directory; none if nothing does."""
    path = directory / name
    if path.is_dir() and not path.is_symlink():
        return [os.path.join(name, found) for found in files_of(path)] or [name]
    return [name] if os.path.lexists(path) else []


def _remove_empty_in(directory: Path, gone: Iterable[str]) -> None:
    """Removes the directories, inside of one, that are empty now that files are gone from them."""
    parents = {parent for name in gone for parent in Path(name).parents}
    for parent in sorted(parents - {Path()}, key=lambda parent: len(parent.parts), reverse=True):
        with suppress(OSError):
            (directory / parent).rmdir()


def _remove_empty(parents: list[Path]) -> None:
    for parent in parents:
        try:
            parent.rmdir()
        except OSError:
            return
