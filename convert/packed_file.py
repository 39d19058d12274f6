"""One file of weights, packed: zeros are not stored. Imports neither JAX nor torch.

    16 bytes    `neuroal-packed-1`, which no reader of safetensors takes for the size of a header
    8 + N       the beginning of the safetensors file as it was: N in 8 bytes, and its header
    then, for every tensor, in the order of their data:
    8 bytes     the number of its values that are kept, or -1: it is stored as it was
    if -1       its bytes
    else        piece by piece of 2^20 elements, row-major: a bit for each element as `numpy.packbits` has them,
                1 = kept, and the kept values

All numbers are little-endian. A value is left out if all its bits are 0, so -0.0 is kept, and so is what no number
says: a NaN's payload. Packed are matrices in F32, F16 and BF16 that become smaller by it.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuroal_jax.checkpoint.safetensors import read_header
from neuroal_jax.checkpoint.tensors import FLOAT_DTYPES
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import SteadyFile, parse_json

MAGIC = b"neuroal-packed-1"
_WORD = 8  # bytes of the numbers between the parts of a file
_AS_IT_WAS = -1
_PIECE = 2**20  # elements; a multiple of 8, so that only a tensor's last piece ends within a byte of bits
_CHUNK = 2**24  # bytes that are copied at a time
_MOST_HEADER = 10**8  # bytes; the safetensors library reads no larger header


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file: its header's name and dtype for it, and how many bytes its data takes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def packable(self) -> bool:
        """Whether it is a matrix of floats, whose data is as long as its shape says."""
        float_matrix = self.dtype in FLOAT_DTYPES and len(self.shape) == 2
        return float_matrix and math.prod(self.shape) * FLOAT_DTYPES[self.dtype].itemsize == self.num_bytes

    @property
    def bits_dtype(self) -> np.dtype:
        """The unsigned numbers of its elements' size."""
        return np.dtype(f"<u{FLOAT_DTYPES[self.dtype].itemsize}")


@dataclass(frozen=True)
class Layout:
    """What a packed file holds, in order.

    Attributes:
        header_bytes: Size of the safetensors file before its data.
        tensors: Its tensors in the order of their data.
        kept: For each of them, the number of values that are kept; None: it is stored as it was.
    """

    header_bytes: int
    tensors: tuple[StoredTensor, ...]
    kept: tuple[int | None, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the safetensors file."""
        return self.header_bytes + sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def packed_bytes(self) -> int:
        """Size of the packed file."""
        stored = (_stored_bytes(tensor, kept) for tensor, kept in zip(self.tensors, self.kept, strict=True))
        return len(MAGIC) + self.header_bytes + sum(_WORD + size for size in stored)


def packed_bytes(elements: int, zeros: int, itemsize: int) -> int:
    """Size in bytes of a matrix's bits and kept values, or of the matrix as it is where that is no more.

    Args:
        elements: Number of elements.
        zeros: How many of them are zero, in all bits.
        itemsize: Bytes of an element.
    """
    return min(-(-elements // 8) + (elements - zeros) * itemsize, elements * itemsize)


def _stored_bytes(tensor: StoredTensor, kept: int | None) -> int:
    if kept is None:
        return tensor.num_bytes
    itemsize = tensor.bits_dtype.itemsize
    elements = tensor.num_bytes // itemsize
    return packed_bytes(elements, elements - kept, itemsize)


def survey(file: SteadyFile) -> tuple[Layout, str]:
    """How a safetensors file is to be packed, and its SHA-256; reads it once.

    Raises:
        UserError: If it is not a complete safetensors file.
    """
    header, start = read_header(file.path)
    tensors = _in_order(file, header)
    digest = hashlib.sha256(file.read(0, start))
    kept = []
    for tensor, (begin, end) in _places(tensors, start):
        count = 0
        for piece in copied(file, begin, end):
            digest.update(piece)
            count += int(np.count_nonzero(np.frombuffer(piece, tensor.bits_dtype))) if tensor.packable else 0
        smaller = tensor.packable and _stored_bytes(tensor, count) < tensor.num_bytes
        kept.append(count if smaller else None)
    return Layout(start, tensors, tuple(kept)), digest.hexdigest()


def pack_file(file: SteadyFile, layout: Layout) -> Iterator[bytes | bytearray]:
    """The bytes of the packed file, piece by piece, given how the safetensors file is to be packed."""
    yield MAGIC
    yield file.read(0, layout.header_bytes)
    for (tensor, (begin, end)), kept in zip(_places(layout.tensors, layout.header_bytes), layout.kept, strict=True):
        yield (_AS_IT_WAS if kept is None else kept).to_bytes(_WORD, "little", signed=True)
        if kept is None:
            yield from copied(file, begin, end)
            continue
        for piece in copied(file, begin, end, _PIECE * tensor.bits_dtype.itemsize):
            values = np.frombuffer(piece, tensor.bits_dtype)
            nonzero = values != 0
            yield np.packbits(nonzero).tobytes()
            yield values[nonzero].tobytes()


def read_layout(file: SteadyFile) -> Layout:
    """What a packed file holds.

    Raises:
        UserError: If it is none, or its size is not what it says of itself.
    """
    size = file.stamp[0]
    if size < len(MAGIC) + _WORD or file.read(0, len(MAGIC)) != MAGIC:
        raise UserError(f"{file.path} is not packed: it does not begin with {MAGIC.decode()}")
    length = int.from_bytes(file.read(len(MAGIC), _WORD), "little")
    at = len(MAGIC) + _WORD + length
    if length > _MOST_HEADER or at > size:
        raise _damaged(file, f"a header of {length} bytes cannot be in its {size}")
    try:
        header = parse_json(file.read(at - length, length).decode())
        if not isinstance(header, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise _damaged(file, f"its header is no JSON ({error})") from error
    header.pop("__metadata__", None)
    tensors, kept = _in_order(file, header), []
    for tensor in tensors:
        if at + _WORD > size:
            raise _damaged(file, f"it ends before tensor {tensor.name}")
        count = int.from_bytes(file.read(at, _WORD), "little", signed=True)
        if count != _AS_IT_WAS and not (tensor.packable and 0 <= count <= math.prod(tensor.shape)):
            raise _damaged(file, f"{count} values of tensor {tensor.name} cannot be kept")
        kept.append(None if count == _AS_IT_WAS else count)
        at += _WORD + _stored_bytes(tensor, kept[-1])
    if at != size:
        raise _damaged(file, f"its tensors take {at} bytes, it has {size}")
    return Layout(_WORD + length, tensors, tuple(kept))


def unpack_file(file: SteadyFile, layout: Layout) -> Iterator[bytes | bytearray]:
    """The bytes of the safetensors file, piece by piece, given what `read_layout` says of the packed one.

    Raises:
        UserError: Where it keeps more or fewer values than it says.
    """
    at = len(MAGIC) + layout.header_bytes
    yield file.read(len(MAGIC), layout.header_bytes)
    for tensor, kept in zip(layout.tensors, layout.kept, strict=True):
        at += _WORD
        end = at + _stored_bytes(tensor, kept)
        yield from copied(file, at, end) if kept is None else _unpack_tensor(file, at, end, tensor)
        at = end


def _unpack_tensor(file: SteadyFile, at: int, end: int, tensor: StoredTensor) -> Iterator[bytes]:
    """The bytes of a tensor that is packed between two places of a file."""
    elements = math.prod(tensor.shape)
    for first in range(0, elements, _PIECE):
        values = np.zeros(min(_PIECE, elements - first), tensor.bits_dtype)
        num_bits = -(-values.size // 8)
        nonzero = np.unpackbits(np.frombuffer(file.read(at, num_bits), np.uint8), count=values.size).astype(bool)
        size = int(np.count_nonzero(nonzero)) * values.itemsize
        if at + num_bits + size > end:
            raise _damaged(file, f"tensor {tensor.name} has more bits than values")
        values[nonzero] = np.frombuffer(file.read(at + num_bits, size), values.dtype)
        at += num_bits + size
        yield values.tobytes()
    if at != end:
        raise _damaged(file, f"tensor {tensor.name} has fewer bits than values")


def copied(file: SteadyFile, begin: int, end: int, size: int = _CHUNK) -> Iterator[bytearray]:
    """The bytes of a file between two places, at most `size` at a time."""
    for at in range(begin, end, size):
        yield file.read(at, min(size, end - at))


def _places(tensors: Iterable[StoredTensor], at: int) -> Iterator[tuple[StoredTensor, tuple[int, int]]]:
    """Tensors, each with where its data begins and ends, if the first one's begins at `at`."""
    for tensor in tensors:
        yield tensor, (at, at + tensor.num_bytes)
        at += tensor.num_bytes


def _in_order(file: SteadyFile, header: Mapping[str, Any]) -> tuple[StoredTensor, ...]:
    """The tensors of a header, in the order of their data.

    Raises:
        UserError: If an entry is no tensor's, or data overlaps or leaves a gap, which would be lost.
    """
    found = sorted((_range(file, name, entry), name) for name, entry in header.items())
    at, tensors = 0, []
    for (begin, end), name in found:
        if begin != at or end < begin:
            raise _damaged(file, f"the data of tensor {name} does not follow on that of the one before")
        tensors.append(StoredTensor(name, header[name]["dtype"], tuple(header[name]["shape"]), end - begin))
        at = end
    return tuple(tensors)


def _range(file: SteadyFile, name: str, entry: Any) -> tuple[int, int]:
    match entry:
        case {"dtype": str(), "shape": list(shape), "data_offsets": [begin, end]} if _whole([*shape, begin, end]):
            return begin, end
    raise _damaged(file, f"its header does not say where tensor {name} is")


def _whole(values: Sequence[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _damaged(file: SteadyFile, what: str) -> UserError:
    return UserError(f"{file.path} is damaged: {what}")
