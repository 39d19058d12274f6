"""The Orbax side of a checkpoint: written by `convert/hf_to_flax.py`, read tensor by tensor."""

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from neuroal_jax.errors import UserError
from neuroal_jax.models.family import ParamRule, expand
from neuroal_jax.tensors import FLOAT_DTYPES, TensorInfo

PARAMS = "params"
_NAMES = {dtype.name: name for name, dtype in FLOAT_DTYPES.items()}


def is_orbax(directory: Path) -> bool:
    """Whether a directory is a checkpoint of `convert/hf_to_flax.py`."""
    return (directory / PARAMS / "_METADATA").is_file()


class OrbaxSource:
    """The `params/` of a directory: Flax paths and orientation on disk, Hugging Face's outside.

    Raises:
        UserError: If Orbax cannot read its metadata.
    """

    def __init__(self, directory: Path, rules: tuple[ParamRule, ...], config: Any) -> None:
        import orbax.checkpoint as ocp

        self._path = (directory / PARAMS).absolute()
        self._checkpointer = ocp.PyTreeCheckpointer()
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

    def read(self, name: str) -> np.ndarray:
        """One tensor in Hugging Face's orientation."""
        import orbax.checkpoint as ocp

        path, transpose = self._places[name]
        how = unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray)}, sep=".")
        args = ocp.args.PyTreeRestore(item=unflatten_dict({path: 0}, sep="."), restore_args=how, partial_restore=True)
        try:
            ((_, array),) = _flatten(self._checkpointer.restore(self._path, args=args))
        except Exception as error:  # Orbax raises many kinds, none of them documented.
            raise UserError(f"{self._path}: {path} cannot be read ({error}): convert the model again") from error
        return np.ascontiguousarray(array.T) if transpose else array


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in _flatten(value, f"{prefix}.{key}" if prefix else key)]
    return [(prefix, tree)]
