"""Tensors by their Hugging Face names, whatever file holds them: dtypes, checks, digests. Without JAX or torch."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np

from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import SteadyFile

FLOAT_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
ALL = slice(None)  # rows of a tensor
_PIECE = 2**20  # elements of a tensor that is there
_PIECE_READ = 2**24  # elements of a tensor that is read


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

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """The tensor as stored, or some rows of it; raises UserError if it cannot be read or its file changed."""

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives tensors other names from now on, from the present ones; files stay as they are."""


BASES = ("model.", "gpt_neox.")  # before transformers' names of parameters outside of the head: most families, GPT-NeoX
_HEADS = {"lm_head.weight": "embed_out.weight"}  # GPT-NeoX: the parameter's name, and that of older versions and files


def parameter_names(stored: Iterable[str], expected: Collection[str]) -> dict[str, str]:
    """The names that transformers gives to tensors which have another one in their file.

    As on loading, the name of the model inside comes first or is left out: OPT's `decoder.layers.0.fc1.weight` is
    `model.decoder.layers.0.fc1.weight`. GPT-NeoX's head has two names.

    Args:
        stored: Names in the files.
        expected: transformers' names of the tensors that there may be.

    Raises:
        UserError: If two tensors have one name.
    """
    names: dict[str, str] = {}
    found = set(stored)
    for name in sorted(found):
        others = [name.removeprefix(base) if name.startswith(base) else base + name for base in BASES]
        other = next((other for other in (*others, _HEADS.get(name)) if other in expected), None)
        if name not in expected and other is not None:
            if other in found:
                raise UserError(f"tensors {name} and {other} are one and the same to transformers: remove one of them")
            names[name] = other
    return names


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; looks at a piece at a time, as it takes memory beside what it looks at."""
    flat = array.reshape(-1)
    return all(_is_finite(flat[start : start + _PIECE]) for start in range(0, flat.size, _PIECE))


def _is_finite(array: np.ndarray) -> bool:
    """Works on the bits of half-precision tensors, which NumPy is slow on."""
    if array.dtype.itemsize == 2:
        exponent = np.uint16(0x7C00 if array.dtype == np.float16 else 0x7F80)
        return not np.any((array.view(np.uint16) & exponent) == exponent)
    return bool(np.isfinite(array).all())


def is_zero(array: np.ndarray) -> np.ndarray:
    """Which elements are zero, of either sign: by their bits, as arithmetic may take the smallest numbers for zero."""
    bits = array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)
    return np.equal(np.left_shift(bits, 1), 0)


def pieces(info: TensorInfo, first: int = 0, end: int | None = None) -> list[slice]:
    """The rows `first` to `end` of a tensor, in parts of a bounded size."""
    end = info.shape[0] if end is None else end
    rows = max(1, _PIECE_READ // math.prod(info.shape[1:]))
    return [slice(start, min(start + rows, end)) for start in range(first, end, rows)]


def digests(
    names: Iterable[str], infos: Mapping[str, TensorInfo], read: Callable[[str, slice], np.ndarray]
) -> dict[str, str]:
    """SHA-256 of each tensor: name, dtype, shape and bytes, whatever file holds it."""
    result = {}
    for name in names:
        info = infos[name]
        digest = hashlib.sha256(f"{name}\0{FLOAT_DTYPES[info.dtype].name}\0{list(info.shape)}\0".encode())
        for rows in pieces(info):
            digest.update(np.ascontiguousarray(read(name, rows)).reshape(-1).view(np.uint8).data)
        result[name] = digest.hexdigest()
    return result


def combine(digests: Mapping[str, str]) -> str:
    """One SHA-256 over several tensors' digests, in the order of their names."""
    return hashlib.sha256("\n".join(digests[name] for name in sorted(digests)).encode()).hexdigest()
