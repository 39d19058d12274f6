"""Reading tensors from safetensors files, one at a time, without JAX or torch."""

import logging
import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from neuroal_jax.checkpoint.listing import ADAPTER, SAFETENSORS, WeightFiles, check_listing
from neuroal_jax.checkpoint.tensors import ALL, FLOAT_DTYPES, TensorInfo
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import SteadyFile, open_plain, parse_json, read_json

SINGLE, INDEX = SAFETENSORS.single, SAFETENSORS.index
log = logging.getLogger("neuroal_jax")

_INDEX_BYTES = 256 * 2**20  # more than any index has


class SafetensorsSource:
    """The `model*.safetensors` files of a directory.

    Raises:
        UserError: If there is no such file, one is corrupt, or the index and the files disagree.
    """

    def __init__(self, directory: Path) -> None:
        self.files, index = weight_files(directory, SAFETENSORS)
        self.steady = [SteadyFile.at(path) for path in self.files]
        self.infos: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[SteadyFile, int]] = {}
        self.names: dict[str, str] = {}  # of tensors that are called otherwise than in their file, by the name there
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

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """The tensor as stored, or some rows of it; raises UserError if it cannot be read or its file changed."""
        info = self.infos[name]
        file, offset = self._places[name]
        dtype = FLOAT_DTYPES[info.dtype]
        first, end, _ = rows.indices(info.shape[0])
        row = math.prod(info.shape[1:]) * dtype.itemsize
        content = file.read(offset + first * row, (end - first) * row)
        return np.frombuffer(content, dtype).reshape(end - first, *info.shape[1:])

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives tensors other names from now on, from the present ones; files stay as they are."""
        stored = {now: name for name, now in self.names.items()}
        for old, new in names.items():
            self.infos[new], self._places[new] = self.infos.pop(old), self._places.pop(old)
            self.names[stored.get(old, old)] = new


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's entries by tensor name, and where its data begins, after the library has validated it.

    Raises:
        UserError: If the file cannot be read or is not a complete safetensors file.
    """
    try:
        with open_plain(path) as file, safe_open(path, framework="np"):
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length).decode()
        if not text.startswith("{"):
            raise ValueError("its header does not begin with {")
        header = parse_json(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}): download or write it again") from error
    header.pop("__metadata__", None)
    return header, 8 + length


def weight_files(directory: Path, weights: WeightFiles) -> tuple[list[Path], dict[str, str]]:
    """The files of a form that hold a directory's weights, and from tensors to files what the index of several says.

    Raises:
        UserError: If there are none, files are missing, or an adapter would come on top.
    """
    check_listing([path.name for path in directory.iterdir() if path.is_file()], weights, str(directory))
    _check_adapter(directory)
    return listed_files(directory, weights)


def listed_files(directory: Path, weights: WeightFiles) -> tuple[list[Path], dict[str, str]]:
    """`weight_files`, of a directory that has one or an index, whatever is beside them."""
    if (directory / weights.single).is_file():
        return [directory / weights.single], {}
    path = directory / weights.index
    index = read_index(path)["weight_map"]
    shards = sorted(set(index.values()))
    for shard in shards:
        if Path(shard).name != shard or not os.path.isfile(directory / shard):
            raise UserError(f"{path} names {shard!r}, which is no file of {directory}")
    return [directory / shard for shard in shards], index


def _check_adapter(directory: Path) -> None:
    """Tells of an adapter beside the weights; raises UserError where transformers would load it on top of them."""
    if not (directory / ADAPTER).is_file():
        return
    if find_spec("peft") is not None:
        raise UserError(
            f"{directory} holds an adapter ({ADAPTER}) beside its weights, and transformers with PEFT, which is "
            "installed, adds it to them: merge it first (merge_and_unload), or move its files away to leave it out"
        )
    log.warning("%s holds an adapter (%s) beside its weights: it is left out", directory, ADAPTER)


def read_index(path: Path) -> dict[str, Any]:
    """The content of an index; its `weight_map` leads from tensors to files.

    Raises:
        UserError: If it is not valid.
    """
    try:
        content = read_json(path, _INDEX_BYTES)
        weight_map = content["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("weight_map is not an object of file names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a valid index ({error})") from error
    return dict(content)
