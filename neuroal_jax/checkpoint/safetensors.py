"""Reading tensors from safetensors files, one at a time, without JAX or torch."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from neuroal_jax.checkpoint.tensors import FLOAT_DTYPES, TensorInfo
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import SteadyFile, parse_json, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_INDEX_BYTES = 256 * 2**20  # more than any index has


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
        for name in sorted(self.infos.keys() - index.keys()) if index else []:
            file = self._places[name][0]
            raise UserError(
                f"{directory / INDEX} does not list tensor {name}, which {file.path.name} holds: download it again"
            )
        for name, shard in sorted(index.items()):
            if name not in self.infos:
                raise UserError(f"{directory / INDEX} lists tensor {name}, which no file holds: download it again")
            if self._places[name][0].path.name != shard:
                raise UserError(
                    f"{directory / INDEX} places tensor {name} in {shard}, but it is in "
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
    if (directory / SINGLE).is_file():
        return [directory / SINGLE], {}
    if (directory / INDEX).is_file():
        index = _read_index(directory)
        shards = sorted(set(index.values()))
        for shard in shards:
            if Path(shard).name != shard or not os.path.isfile(directory / shard):
                raise UserError(f"{directory / INDEX} names {shard!r}, which is no file of {directory}")
        return [directory / shard for shard in shards], index
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise UserError(
            f"{directory} holds only pickled weights ({pickles[0]}): unpickling can run code, so they are never read; "
            "convert them to safetensors first (save_pretrained of transformers does)"
        )
    raise UserError(f"{directory} holds no {SINGLE} and no {INDEX}")


def _read_index(directory: Path) -> dict[str, str]:
    path = directory / INDEX
    try:
        weight_map = read_json(path, _INDEX_BYTES)["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("weight_map is not an object of file names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a valid index ({error})") from error
    return weight_map
