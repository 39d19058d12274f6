"""Reading and writing tensors by their Hugging Face names: safetensors files, lazily, without JAX or torch."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import SteadyFile, parse_json, read_json

FLOAT_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_BYTES = 5 * 10**9
_CHUNK_BYTES = 2**24
_INDEX_BYTES = 256 * 2**20  # more than any index has
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".py"}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor; `dtype` is safetensors' name for it (`BF16`)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class TensorSource(Protocol):
    """Tensors by Hugging Face name and orientation, read one at a time."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, without reading it."""

    @property
    def steady(self) -> Sequence[SteadyFile]:
        """The files that must stay as they are while tensors are read."""

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored; raises UserError if it cannot be read or its file changed."""


class SafetensorsSource:
    """The `model*.safetensors` files of a directory.

    Raises:
        UserError: If there is no such file, one is corrupt, or the index and the files disagree.
    """

    def __init__(self, directory: Path) -> None:
        self.files, index = _weight_files(directory)
        self.steady = [SteadyFile.at(path) for path in self.files]
        self.infos: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[SteadyFile, int]] = {}
        for file in self.steady:
            header, start = read_header(file.path)
            for name, entry in header.items():
                if name in self.infos:
                    raise UserError(
                        f"tensor {name} is in two files, {self._places[name][0].path.name} and {file.path.name}"
                    )
                self.infos[name] = TensorInfo(tuple(entry["shape"]), entry["dtype"])
                self._places[name] = (file, start + entry["data_offsets"][0])
        for name, shard in sorted(index.items()):
            if name not in self.infos:
                raise UserError(f"{directory / _INDEX} lists tensor {name}, which no file holds: download it again")
            if self._places[name][0].path.name != shard:
                raise UserError(
                    f"{directory / _INDEX} places tensor {name} in {shard}, but it is in "
                    f"{self._places[name][0].path.name}: download it again"
                )

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored; raises UserError if it cannot be read or its file changed."""
        info = self.infos[name]
        file, offset = self._places[name]
        dtype = FLOAT_DTYPES[info.dtype]
        return np.frombuffer(file.read(offset, info.size * dtype.itemsize), dtype).reshape(info.shape)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's entries by tensor name, and where its data begins, after the library has validated it.

    Raises:
        UserError: If the file cannot be read or is not a complete safetensors file.
    """
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length).decode()
        if not text.startswith("{"):
            raise ValueError("its header does not begin with {")
        header = parse_json(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}): download or write it again") from error
    header.pop("__metadata__", None)
    return header, 8 + length


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files, and the index of a checkpoint that is in several."""
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE], {}
    if (directory / _INDEX).is_file():
        index = _read_index(directory)
        shards = sorted(set(index.values()))
        for shard in shards:
            if Path(shard).name != shard or not os.path.isfile(directory / shard):
                raise UserError(f"{directory / _INDEX} names {shard!r}, which is no file of {directory}")
        return [directory / shard for shard in shards], index
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise UserError(
            f"{directory} holds only pickled weights ({pickles[0]}): unpickling can run code, so they are never read; "
            "convert them to safetensors first (save_pretrained of transformers does)"
        )
    raise UserError(f"{directory} holds no {_SINGLE} and no {_INDEX}")


def _read_index(directory: Path) -> dict[str, str]:
    path = directory / _INDEX
    try:
        weight_map = read_json(path, _INDEX_BYTES)["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("weight_map is not an object of file names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a valid index ({error})") from error
    return weight_map


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; works on the bits of half-precision tensors, which NumPy is slow on."""
    if array.dtype.itemsize == 2:
        exponent = np.uint16(0x7C00 if array.dtype == np.float16 else 0x7F80)
        return not np.any((array.view(np.uint16) & exponent) == exponent)
    return bool(np.isfinite(array).all())


def digests(names: Iterable[str], read: Callable[[str], np.ndarray]) -> dict[str, str]:
    """SHA-256 of each tensor: name, dtype, shape and bytes, whatever file holds it."""
    result = {}
    for name in names:
        array = np.ascontiguousarray(read(name))
        digest = hashlib.sha256(f"{name}\0{array.dtype.name}\0{list(array.shape)}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
        result[name] = digest.hexdigest()
    return result


def combine(digests: Mapping[str, str]) -> str:
    """One SHA-256 over several tensors' digests, in the order of their names."""
    return hashlib.sha256("\n".join(digests[name] for name in sorted(digests)).encode()).hexdigest()


Edit = Callable[[str, np.ndarray], np.ndarray]


def copy_edited(source: SafetensorsSource, directory: Path, edited: Iterable[str], edit: Edit) -> None:
    """Copies a checkpoint's weight files, passing the tensors named in `edited` through `edit`, all else byte for byte.

    Headers, file names and the index stay as they are, so every reader of the original reads the copy.
    """
    changed = frozenset(edited)
    for file in source.steady:
        header, start = read_header(file.path)
        with (directory / file.path.name).open("wb") as new:
            new.write(file.read(0, start))
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = entry["data_offsets"]
                if name in changed:
                    array = edit(name, source.read(name))
                    # safetensors expects row-major bytes; a transposed view would write the wrong order.
                    new.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                else:
                    for at in range(begin, end, _CHUNK_BYTES):
                        new.write(file.read(start + at, min(_CHUNK_BYTES, end - at)))
            new.flush()
            os.fsync(new.fileno())
    index = source.files[0].parent / _INDEX
    if index.is_file() and source.files[0].name != _SINGLE:
        copy_file(index, directory / _INDEX)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file; raises UserError if it cannot be read, OSError if it cannot be written."""
    try:
        content = source.open("rb")
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror})") from error
    with content, target.open("wb") as new:
        shutil.copyfileobj(content, new)


DIGESTS = "params_sha256.json"  # of an Orbax checkpoint's files, which have no checksums of their own


def copy_side_files(source: Path, directory: Path) -> None:
    """Copies config, tokenizer and other small files of a checkpoint's top level, never weights or code."""
    for path in sorted(source.iterdir()):
        skipped = path.suffix in _NOT_COPIED or path.name.endswith((".safetensors.index.json", DIGESTS))
        if path.is_file() and not skipped:
            copy_file(path, directory / path.name)


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
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: source.read(name) for name in names}
        arrays = {name: edit(name, array) if name in changed else array for name, array in arrays.items()}
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(contiguous, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        (directory / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
