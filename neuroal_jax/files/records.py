"""Which files of a directory an earlier run wrote.

By name, size and time of change, so that a file that was changed since is not taken for what was written.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuroal_jax.files.claims import beside
from neuroal_jax.files.reading import read_json
from neuroal_jax.files.writing import replace_text

_FORMAT = "neuroal-files-1"
_MOST_BYTES = 2**26

Record = Mapping[str, tuple[int, int]]  # by relative path: size, and time of change in ns


@dataclass(frozen=True)
class Earlier:
    """What a directory holds of earlier runs.

    Attributes:
        ours: Relative paths of files that are as a run wrote them.
        changed: Relative paths of what a run wrote, or may have written, and what may hold a user's work now.
    """

    ours: frozenset[str] = field(default_factory=frozenset)
    changed: frozenset[str] = field(default_factory=frozenset)


def files_of(directory: Path) -> list[str]:
    """Relative paths of all that lies in a directory, at any depth, and is no directory or an empty one."""
    found = []
    for place, directories, files in os.walk(directory):
        links = [name for name in directories if os.path.islink(os.path.join(place, name))]
        names = [*files, *links] or ([] if directories or Path(place) == directory else ["."])
        found += [os.path.relpath(os.path.join(place, name), directory) for name in names]
    return sorted(found)


def record_of(directory: Path) -> dict[str, tuple[int, int]]:
    """The record of all files that are in a directory now."""
    return {name: stamp for name in files_of(directory) if (stamp := _stamp(directory / name)) is not None}


def compare(directory: Path, record: Record) -> Earlier:
    """What is left of a record."""
    found = {name: _stamp(directory / name) for name in record if os.path.lexists(directory / name)}
    ours = frozenset(name for name, stamp in found.items() if stamp == record[name])
    return Earlier(ours, frozenset(found) - ours)


def to_json(record: Record) -> dict[str, Any]:
    """A record as manifests have it."""
    return {name: {"bytes": size, "mtime_ns": time} for name, (size, time) in record.items()}


def from_json(value: Any) -> Record:
    """The record in a manifest; raises ValueError if it is none."""
    try:
        items = {str(name): (int(found["bytes"]), int(found["mtime_ns"])) for name, found in value.items()}
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"its record of files is damaged ({error!r})") from error
    if any(os.path.isabs(name) or ".." in Path(name).parts for name in items):
        raise ValueError("its record of files names files elsewhere")
    return items


def record_path(directory: Path) -> Path:
    """Where the record of a model's directory lies: beside it, since the directory holds the model and nothing else."""
    return beside(Path(os.path.realpath(directory)), ".neuroal-files.json")


def read_record(path: Path) -> Record:
    """A file of `write_record`; an empty record where there is none, or something else."""
    try:
        content = read_json(path, _MOST_BYTES)
        return from_json(content["files"]) if content["format"] == _FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_record(path: Path, record: Record) -> None:
    """Writes a record, whole or not at all; never over a file that is none."""
    if not os.path.lexists(path) or read_record(path):
        replace_text(path, json.dumps({"format": _FORMAT, "files": to_json(record)}, indent=1) + "\n")


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of a file; None for anything else."""
    if not path.is_file() or path.is_symlink():
        return None
    status = path.stat()
    return status.st_size, status.st_mtime_ns
