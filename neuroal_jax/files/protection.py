"""What a program reads is its user's: nothing in, above or below it is ever removed or replaced.

Places are compared by their real path and by inode: links, bind mounts, hard links and file systems that know no upper
case give one thing several names.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from neuroal_jax.errors import UserError

_MOST_LINKS = 64  # as many as the system follows, and more
_MOST_FILES = 100_000  # of one directory that are looked at for links; far more than any model has

Key = str | tuple[int, int]  # a real path, or a device and an inode there


class Inputs:
    """The files and directories that a program reads, each with the flag that names it.

    Paths that are None or name nothing, such as a model id on the Hugging Face Hub, are left out.
    """

    def __init__(self, *paths: tuple[str, str | Path | None]) -> None:
        self._inputs = [_Input(flag, Path(path)) for flag, path in paths if path and os.path.lexists(path)]

    def touched_by(self, path: Path) -> str | None:
        """The input that would be lost or changed if `path` were removed or replaced; None if there is none."""
        own, above = _keys(path), _keys(*_real(path).parents)
        return self._first(one for one in self._inputs if own & (one.way | one.held) or above & one.held)

    def holding(self, path: Path) -> str | None:
        """The input that `path`, which need not exist, is or lies in; None if there is none."""
        real = Path(os.path.realpath(path))
        above = _keys(real, *real.parents)
        return self._first(one for one in self._inputs if above & one.held)

    def within(self, directory: Path) -> str | None:
        """An input that lies in a directory, or is it; None if there is none."""
        own = _keys(Path(os.path.realpath(directory)))
        return self._first(one for one in self._inputs if own & one.way)

    @staticmethod
    def _first(found: "Iterable[_Input]") -> str | None:
        return next((f"{one.flag} {one.path}" for one in found), None)

    def protect(self, paths: Iterable[Path], flag: str) -> None:
        """Raises UserError if removing or replacing one of `paths`, as writing to `flag` would, touches an input."""
        for path in paths:
            touched = self.touched_by(path)
            if touched is not None:
                raise UserError(
                    f"{flag}: {path} would be replaced, which belongs to {touched}, an input of this very program: "
                    "choose another place"
                )


class _Input:
    """An input: `held` is it and what lies in it, `way` it and all that leads to it."""

    def __init__(self, flag: str, path: Path) -> None:
        self.flag, self.path = flag, path
        self.held = _keys(Path(os.path.realpath(path)))
        self.way = _way(path) | self.held
        for inside in _files_in(path):
            self.held |= _keys(inside)
            if inside.is_symlink():
                self.held |= _keys(Path(os.path.realpath(inside)))
                self.way |= _way(inside)


def same_place(first: str | Path, second: str | Path) -> bool:
    """Whether two paths, which need not exist, lead to one place."""
    return bool(_keys(Path(os.path.realpath(first))) & _keys(Path(os.path.realpath(second))))


def lies_in(path: str | Path, directory: str | Path) -> bool:
    """Whether a path is a directory or lies in it; neither needs to exist."""
    real = Path(os.path.realpath(path))
    return bool(_keys(real, *real.parents) & _keys(Path(os.path.realpath(directory))))


def _real(path: Path) -> Path:
    """The path of a directory entry: links on the way are followed, the entry itself is not."""
    return Path(os.path.realpath(path.parent)) / path.name


def _keys(*paths: Path) -> set[Key]:
    """How directory entries are recognised, whether or not they are links."""
    found: set[Key] = {str(_real(path)) for path in paths}
    for path in paths:
        with suppress(OSError, ValueError):
            status = os.lstat(path)
            found |= {(status.st_dev, status.st_ino)} if status.st_ino else set()
    return found


def _way(path: Path) -> set[Key]:
    """All entries that the system goes through to reach a path: directories, links and what they stand for."""
    found: set[Key] = set()
    left, seen = [Path(os.path.abspath(path)), Path(os.path.realpath(path))], 0
    while left and seen < _MOST_LINKS:
        current = left.pop()
        seen += 1
        for part in (current, *current.parents):
            found |= _keys(part)
            if part.is_symlink():
                place = os.path.join(os.path.realpath(part.parent), os.readlink(part))
                left.append(Path(os.path.abspath(place)))
    return found


def _files_in(directory: Path) -> Iterator[Path]:
    """What lies in a directory, at any depth."""
    number = 0
    for place, directories, files in os.walk(directory):
        for name in (*directories, *files):
            number += 1
            if number > _MOST_FILES:
                return
            yield Path(place, name)
