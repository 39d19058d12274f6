"""The files of a state: trees of arrays as safetensors, each whole and unchanged or not read at all."""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from neuroal_jax.files.writing import replaced

Output = dict[str, Any]  # of one block: nested dicts of arrays and numbers

_NAME = re.compile(r"(\d+)-([a-z-]+)-(\d+)\.(hidden|outputs)")
_PARTIAL = re.compile(rf"\.({_NAME.pattern}|identity\.json)\.[\d-]+\.partial")


class Item(NamedTuple):
    """A file of a state; the order of items is that of the run."""

    walk: int
    block: int
    label: str
    kind: str

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.walk:02d}-{self.label}-{self.block:05d}.{self.kind}"


class Store:
    """The items in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def items(self) -> list[Item]:
        """All that are there, in order."""
        found = (_NAME.fullmatch(name) for name in sorted(os.listdir(self.directory)))
        return [Item(int(match[1]), int(match[3]), match[2], match[4]) for match in found if match]

    def save(self, item: Item, content: Output) -> None:
        """Writes an item whole or not at all; keys are text without a slash, and keep their order."""
        save_tree(self.directory / item.name, content)

    def read(self, item: Item) -> Output:
        """An item's content, numbers as arrays without axes; raises ValueError if it is not what was written."""
        return read_tree(self.directory / item.name)[0]

    def forget(self, unwanted: Callable[[Item], bool]) -> None:
        """Removes items, and those that a kill left half-written."""
        names = {item.name for item in self.items() if unwanted(item)}
        for name in os.listdir(self.directory):
            if name in names or _PARTIAL.fullmatch(name):
                (self.directory / name).unlink(missing_ok=True)

    def clear(self, *more: str) -> None:
        """Removes all items, and `more` files."""
        self.forget(lambda item: True)
        for name in more:
            (self.directory / name).unlink(missing_ok=True)

    def others(self, *more: str) -> list[str]:
        """What is neither an item nor one of `more` files: nothing of it is this store's."""
        own = {*more, *(item.name for item in self.items())}
        return sorted(name for name in os.listdir(self.directory) if name not in own and not _PARTIAL.fullmatch(name))


def save_tree(path: Path, content: Output, **about: Any) -> None:
    """Writes a tree of arrays whole or not at all, with more `about` it, as JSON; keys as `Store.save`."""
    flat = flatten_dict(content, keep_empty_nodes=True, sep="/")
    arrays = {key: np.asarray(value, order="C") for key, value in flat.items() if value is not empty_node}
    metadata = {"about": json.dumps({**about, "keys": list(flat), "checksum": _checksum(arrays)})}
    with replaced(path) as part:
        save_file(arrays, part, metadata=metadata)


def read_tree(path: Path) -> tuple[Output, dict[str, Any]]:
    """A tree that `save_tree` wrote, numbers as arrays without axes, and what it was told about it.

    Raises:
        ValueError: If it is not what was written. (Other errors, too, for damaged files.)
    """
    with safe_open(path, framework="np") as file:
        about: dict[str, Any] = json.loads(file.metadata()["about"])
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    if about["checksum"] != _checksum(arrays):
        raise ValueError(f"{path.name} is not what was written")
    return unflatten_dict({key: arrays.get(key, {}) for key in about["keys"]}, sep="/"), about


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of named arrays."""
    value = 0
    for part in bytes_of(arrays):
        value = zlib.crc32(part, value)
    return value


def bytes_of(arrays: Mapping[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    """All that tells named arrays apart: names, dtypes, shapes and contents."""
    for name in sorted(arrays):
        array = arrays[name]
        yield f"{name}{array.dtype}{array.shape}".encode()
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
