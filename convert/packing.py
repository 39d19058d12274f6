"""A pruned checkpoint, smaller on disk: zeros of its matrices are not stored. Imports neither JAX nor torch.

A packed directory is no checkpoint, and nothing loads it: `x.safetensors` is `x.neuroal-packed` there (`packed_file`
tells its format), all other files are as they were, and `neuroal-packed.json` has the SHA-256 of every original file.
Unpacking gives all of them back, byte for byte, or nothing.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from neuroal_jax.checkpoint.listing import PACKED, PICKLED, SAFETENSORS, check_listing
from neuroal_jax.checkpoint.locate import locate
from neuroal_jax.checkpoint.safetensors import listed_files
from neuroal_jax.checkpoint.saving import stays_inside
from neuroal_jax.command.values import refuse_same_directory
from neuroal_jax.errors import UserError, shorten
from neuroal_jax.files.protection import Inputs, lies_in
from neuroal_jax.files.reading import SteadyFile, check_steady, read_json, what_is
from neuroal_jax.files.staging import staged
from neuroal_jax.files.writing import naming, write_json

from .packed_file import copied, pack_file, read_layout, survey, unpack_file

FORMAT = "neuroal-packed-1"
_WEIGHTS, _PACKED_WEIGHTS = ".safetensors", ".neuroal-packed"
_SHA256 = re.compile("[0-9a-f]{64}")
_MOST_BYTES = 2**26  # of the list of files
log = logging.getLogger("neuroal_jax")


@dataclass(frozen=True)
class Sizes:
    """Bytes of a checkpoint's files of weights, before and after they are packed."""

    before: int
    after: int

    def __str__(self) -> str:
        return f"weights of {self.before:,} bytes in {self.after:,} ({self.after / self.before:.2f})"


def pack(model: str, out: Path, *, overwrite: bool = False) -> Sizes:
    """Writes a checkpoint packed: matrices as bits and kept values, everything else as it is.

    Links are followed to plain files; those that lead out of the directory, and what is no file, are left out, and the
    log says so. Empty directories are left out too. Memory holds pieces of a tensor.

    Args:
        model: Directory or Hub id of the pruned checkpoint, in safetensors.
        out: Directory to write.
        overwrite: Whether to replace what an earlier run wrote to `out`.

    Raises:
        UserError: If no tensor would become smaller, the directory is packed already or holds weights that would still
            load, or something cannot be read or written.
    """
    source = locate(model)
    _refuse_place("--model", source, out)
    names = _files_in(source)
    weights = _check_checkpoint(source, names)
    files = {name: SteadyFile.at(source / name) for name in names}
    inputs = Inputs(("--model", source))
    with staged(out, overwrite=overwrite, marker=PACKED, flag="--out", inputs=inputs) as staging:
        surveys = {name: survey(files[name]) for name in weights}
        layouts = {name: layout for name, (layout, _) in surveys.items()}
        digests = {name: digest for name, (_, digest) in surveys.items()}
        if all(kept is None for layout in layouts.values() for kept in layout.kept):
            raise UserError(f"{model}: nothing to pack: no tensor would become smaller (is it pruned?)")
        for name, file in files.items():
            pieces = pack_file(file, layouts[name]) if name in layouts else copied(file, 0, file.stamp[0])
            written = _write(staging / _packed_name(name), pieces)
            digests.setdefault(name, written)  # of what is packed, the original's is there already
        write_json(staging / PACKED, {"format": FORMAT, "files": dict(sorted(digests.items()))})
        check_steady(files.values())
    return Sizes(
        sum(layout.num_bytes for layout in layouts.values()), sum(layout.packed_bytes for layout in layouts.values())
    )


def unpack(packed: Path, out: Path, *, overwrite: bool = False) -> None:
    """Writes the checkpoint that a packed directory was made from, every file byte for byte.

    Args:
        packed: Directory that `pack` wrote.
        out: Directory to write.
        overwrite: Whether to replace what an earlier run wrote to `out`.

    Raises:
        UserError: If the directory is not packed, any of its files is missing or damaged, or `out` cannot be written.
    """
    if not os.path.isdir(packed):
        raise UserError(f"--packed {packed} is {what_is(packed)}, expected a directory that pack wrote")
    _refuse_place("--packed", packed, out)
    digests = _read_digests(packed)
    names, found = {name: _packed_name(name) for name in digests}, {*_files_in(packed)} - {PACKED}
    if missing := sorted({*names.values()} - found):
        raise UserError(f"{packed} lacks {shorten(missing)}, which pack wrote: copy it again")
    if extra := sorted(found.difference(names.values())):
        raise UserError(f"{packed} holds {shorten(extra)}, which pack did not write: move it away")
    files = {name: SteadyFile.at(packed / stored) for name, stored in names.items()}
    layouts = {name: read_layout(files[name]) for name, stored in names.items() if stored != name}
    inputs = Inputs(("--packed", packed))
    with staged(out, overwrite=overwrite, marker="config.json", flag="--out", inputs=inputs) as staging:
        for name, file in files.items():
            pieces = unpack_file(file, layouts[name]) if name in layouts else copied(file, 0, file.stamp[0])
            if _write(staging / name, pieces) != digests[name]:
                raise UserError(f"{file.path} is damaged: it does not give {name} as it was packed; copy it again")
        check_steady(files.values())


def _refuse_place(flag: str, source: Path, out: Path) -> None:
    """Raises UserError if the new directory would be, or lie in, the one whose files are read."""
    refuse_same_directory({flag: str(source), "--out": str(out)})
    if lies_in(out, source):
        raise UserError(f"--out {out} lies in {flag} {source}: choose another directory")


def _check_checkpoint(source: Path, names: Iterable[str]) -> list[str]:
    """The files of weights of a checkpoint that may be packed, all at its top."""
    top = [name for name in names if "/" not in name]
    if packed := [name for name in top if name == PACKED or name.endswith(_PACKED_WEIGHTS)]:
        raise UserError(f"{source} is packed already ({packed[0]})")
    if "config.json" not in top:
        raise UserError(f"{source} has no config.json: expected a Hugging Face checkpoint directory")
    check_listing(top, SAFETENSORS, str(source))
    weights = [name for name in top if name.endswith(_WEIGHTS)]
    listed = [path.name for path in listed_files(source, SAFETENSORS)[0]]
    if others := [*PICKLED.among(top), *(name for name in listed if name not in weights)]:
        raise UserError(
            f"{source} holds weights that are no safetensors too ({shorten(others)}), which would still be loaded from "
            "the packed directory: move them away"
        )
    return weights


def _files_in(directory: Path) -> list[str]:
    """The files of a directory at any depth, by their relative paths; tells of what is no file, or lies elsewhere."""
    found = []
    for place, directories, files in os.walk(directory, onerror=_cannot_be_read):
        for name in [*files, *(name for name in directories if os.path.islink(os.path.join(place, name)))]:
            path = Path(place, name)
            relative = path.relative_to(directory).as_posix()
            if not path.is_file():
                log.warning("%s is not copied: it is %s, expected a file", path, what_is(path))
            elif _is_weights(relative, (_WEIGHTS, _PACKED_WEIGHTS)) or stays_inside(path, directory):
                found.append(relative)
    return sorted(found)


def _cannot_be_read(error: OSError) -> None:
    """Of a folder, which `os.walk` would leave out without a word."""
    raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error


def _is_weights(name: str, suffixes: str | tuple[str, ...] = _WEIGHTS) -> bool:
    return "/" not in name and name.endswith(suffixes)


def _packed_name(name: str) -> str:
    """The name in the packed directory of what becomes of a file."""
    return name.removesuffix(_WEIGHTS) + _PACKED_WEIGHTS if _is_weights(name) else name


def _read_digests(source: Path) -> Mapping[str, str]:
    """SHA-256 of the original files, by their relative paths."""
    path = source / PACKED
    if not os.path.lexists(path):
        raise UserError(f"{source} is not packed: it has no {PACKED}")
    try:
        content = read_json(path, _MOST_BYTES)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        files = content.get("files")
        if not isinstance(files, dict) or not all(isinstance(v, str) and _SHA256.fullmatch(v) for v in files.values()):
            raise ValueError("'files' is no object of SHA-256")
        if "config.json" not in files or not any(map(_is_weights, files)):
            raise ValueError("'files' names no config.json, or no weights")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): copy it again") from error
    return files


def _write(path: Path, pieces: Iterable[bytes | bytearray]) -> str:
    """Writes a file and the directories above it; gives its SHA-256."""
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("xb") as new:
        for piece in pieces:
            digest.update(piece)
            new.write(piece)
        new.flush()
        os.fsync(new.fileno())
    return digest.hexdigest()
