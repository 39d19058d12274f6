"""The Orbax side of a checkpoint: written by `convert/hf_to_flax.py`, read tensor by tensor."""

import hashlib
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from neuroal_jax.checkpoint.saving import DIGESTS
from neuroal_jax.checkpoint.tensors import ALL, FLOAT_DTYPES, TensorInfo
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import SteadyFile, read_json
from neuroal_jax.models.family import ParamRule, expand

PARAMS = "params"
_DIGEST_BYTES = 256 * 2**20  # more than the digests of any model take
_SMALL_BYTES = 2**20
_NAMES = {dtype.name: name for name, dtype in FLOAT_DTYPES.items()}


def is_orbax(directory: Path) -> bool:
    """Whether a directory is a checkpoint of `convert/hf_to_flax.py`."""
    return (directory / PARAMS / "_METADATA").is_file()


class OrbaxSource:
    """The `params/` of a directory: Flax paths and orientation on disk, Hugging Face's outside.

    Files are compared with the digests that the conversion wrote beside them: small ones, which tell where the tensors
    are, at once; all others before the first tensor is read.

    Raises:
        UserError: If Orbax cannot read its metadata, or a file is not what the conversion wrote.
    """

    def __init__(self, directory: Path, rules: tuple[ParamRule, ...], config: Any) -> None:
        import orbax.checkpoint as ocp

        self._path = (directory / PARAMS).absolute()
        # All but directories: what is no file, Orbax would wait for.
        self._unchecked = _read_digests(directory / DIGESTS)
        # Those that the conversion wrote, where it says which they are: results of a run may lie beside them.
        found = {str(file.relative_to(self._path)): file for file in sorted(self._path.rglob("*")) if not file.is_dir()}
        self.steady = [SteadyFile.at(path) for name, path in found.items() if name in (self._unchecked or found)]
        self._check_files(_SMALL_BYTES)
        self._checking = threading.Lock()  # tensors are read from two threads
        self._checkpointer = ocp.PyTreeCheckpointer()
        self._begun: tuple[str, np.ndarray] | None = None  # a tensor that is read in parts, before its last rows
        try:
            tree = self._checkpointer.metadata(self._path).item_metadata.tree
        except Exception as error:  # Orbax raises many kinds, none of them documented.
            raise UserError(f"{self._path} is not a readable Orbax checkpoint ({error})") from error
        names = expand(rules, config.num_hidden_layers)
        by_flax = {rule.flax.format(block=block): (hf, rule) for hf, (rule, block) in names.items()}
        self.infos: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[str, bool]] = {}
        for path, leaf in _flatten(tree):
            hf, rule = by_flax.get(path, (path, None))
            transpose = rule is not None and rule.transpose
            shape = tuple(leaf.shape)[::-1] if transpose else tuple(leaf.shape)
            dtype = np.dtype(leaf.dtype).name
            self.infos[hf] = TensorInfo(shape, _NAMES.get(dtype, dtype))
            self._places[hf] = (path, transpose)

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """One tensor, or some rows of it, in Hugging Face's orientation.

        Orbax restores whole tensors: one that is read in parts stays until its last rows, or another one, are read.
        """
        begun = self._begun
        array = begun[1] if begun is not None and begun[0] == name else self._restore(name)
        ended = rows.indices(len(array))[1] == len(array)
        self._begun = None if ended else (name, array)
        return np.ascontiguousarray(array[rows])

    def _restore(self, name: str) -> np.ndarray:
        import orbax.checkpoint as ocp

        with self._checking:
            self._check_files(math.inf)
        path, transpose = self._places[name]
        how = unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray)}, sep=".")
        args = ocp.args.PyTreeRestore(item=unflatten_dict({path: 0}, sep="."), restore_args=how, partial_restore=True)
        try:
            ((_, array),) = _flatten(self._checkpointer.restore(self._path, args=args))
        except Exception as error:  # Orbax raises many kinds, none of them documented.
            raise UserError(f"{self._path}: {path} cannot be read ({error}): convert the model again") from error
        restored: np.ndarray = array.T if transpose else array
        return restored

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives tensors other names from now on, from the present ones; files stay as they are."""
        self._begun = None
        for old, new in names.items():
            self.infos[new], self._places[new] = self.infos.pop(old), self._places.pop(old)

    def _check_files(self, largest: float) -> None:
        """Raises UserError if a file that was not checked before, of at most `largest` bytes, is not what it was."""
        sizes = {str(file.path.relative_to(self._path)): file.stamp[0] for file in self.steady}
        for name, digest in list(self._unchecked.items()):
            if name not in sizes:
                raise UserError(f"{self._path / name} is missing: convert the model again")
            if sizes[name] <= largest:
                if _sha256(self._path / name) != digest:
                    raise UserError(f"{self._path / name} is not what the conversion wrote: convert the model again")
                del self._unchecked[name]


def file_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file in a directory, by its path from there."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): convert the model again") from error


def _read_digests(path: Path) -> dict[str, str]:
    if not path.exists():  # a checkpoint of an older version
        return {}
    try:
        found = read_json(path, _DIGEST_BYTES)
        if not isinstance(found, dict):
            raise ValueError(f"holds a {type(found).__name__}, expected an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): convert the model again") from error
    return found


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in _flatten(value, f"{prefix}.{key}" if prefix else key)]
    return [(prefix, tree)]
