"""Writing a checkpoint as Hugging Face has it, some tensors edited, all else as it was. Without JAX or torch."""

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors.numpy import save_file

from neuroal_jax.checkpoint.listing import TEMPLATES, is_side_file
from neuroal_jax.checkpoint.safetensors import INDEX, SINGLE, SafetensorsSource, read_header, read_index
from neuroal_jax.checkpoint.tensors import FLOAT_DTYPES, TensorSource
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import open_plain
from neuroal_jax.files.writing import naming, write_json

log = logging.getLogger("neuroal_jax")

DIGESTS = "params_sha256.json"  # of an Orbax checkpoint's files, which have no checksums of their own
_SHARD_BYTES = 5 * 10**9
_CHUNK_BYTES = 2**24

Edit = Callable[[str, np.ndarray], np.ndarray]  # a tensor's name and what is stored, to what is written instead


def copy_edited(source: SafetensorsSource, directory: Path, edited: Iterable[str], edit: Edit) -> None:
    """Copies a checkpoint's weight files, passing the tensors named in `edited` through `edit`, all else byte for byte.

    Headers, file names and the index stay as they are, so every reader of the original reads the copy. An index that
    transformers cannot read is completed.
    """
    changed = frozenset(edited)
    for file in source.steady:
        header, start = read_header(file.path)
        path = directory / file.path.name
        with naming(path), path.open("wb") as new:
            new.write(file.read(0, start))
            for stored, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = entry["data_offsets"]
                name = source.names.get(stored, stored)
                if name in changed:
                    array = edit(name, source.read(name))
                    # safetensors expects row-major bytes; a transposed view would write the wrong order.
                    new.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                else:
                    for at in range(begin, end, _CHUNK_BYTES):
                        new.write(file.read(start + at, min(_CHUNK_BYTES, end - at)))
            new.flush()
            os.fsync(new.fileno())
    index = source.files[0].parent / INDEX
    if index.is_file() and source.files[0].name != SINGLE:
        content = read_index(index)
        if isinstance(content.get("metadata"), dict):
            copy_file(index, directory / INDEX)
        else:  # transformers fails without
            write_json(directory / INDEX, {**content, "metadata": {}})


def copy_file(source: Path, target: Path) -> None:
    """Copies a file; raises UserError if it cannot be read, OSError if it cannot be written."""
    try:
        with open_plain(source) as content, naming(target), target.open("wb") as new:
            while piece := _read_piece(content, source):
                new.write(piece)
    except OSError as error:
        if error.filename == str(source):
            raise UserError(f"{source} cannot be read ({error.strerror})") from error
        raise


def _read_piece(file: BinaryIO, path: Path) -> bytes:
    with naming(path):
        return file.read(_CHUNK_BYTES)


def copy_side_files(source: Path, directory: Path) -> None:
    """Copies what belongs to a model besides its weights: config, tokenizer, chat templates, license.

    A link is followed to where the config lies, as in the Hub's cache, and within the directory; what else it leads to
    may be anything, and is left out.
    """
    for path in sorted([*source.iterdir(), *(source / TEMPLATES).glob("*.jinja")]):
        name = path.relative_to(source)
        if path.is_file() and is_side_file(name.as_posix()) and stays_inside(path, source):
            (directory / name).parent.mkdir(exist_ok=True)
            copy_file(path, directory / name)


def stays_inside(path: Path, directory: Path) -> bool:
    """Whether a file of a model's directory lies, once links are followed, in it or beside its config; tells if not."""
    real = Path(os.path.realpath(path))
    inside = real.is_relative_to(os.path.realpath(directory))
    if not inside and real.parent != Path(os.path.realpath(directory / "config.json")).parent:
        log.warning("%s is not copied: it is a link out of the model's directory", path)
        return False
    return True


def write_checkpoint(source: TensorSource, directory: Path, edited: Iterable[str], edit: Edit) -> None:
    """Writes any source as safetensors files of at most 5 GB with an index, passing `edited` through `edit`."""
    changed = frozenset(edited)
    shards: list[list[str]] = [[]]
    room = _SHARD_BYTES
    for name in sorted(source.infos):
        size = source.infos[name].size * FLOAT_DTYPES[source.infos[name].dtype].itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(name)
        room -= size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: source.read(name) for name in names}
        arrays = {name: edit(name, array) if name in changed else array for name, array in arrays.items()}
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        with naming(directory / file):
            save_file(contiguous, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(directory / INDEX, {"metadata": {}, "weight_map": weight_map})
