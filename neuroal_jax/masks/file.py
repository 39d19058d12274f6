"""The mask file: which weights are kept, by Hugging Face name, in torch orientation, one bit a weight. Imports no JAX.

A safetensors file of uint8 tensors `[out, ceil(in / 8)]`: bits packed along the input axis as `numpy.packbits` does,
1 = kept.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from neuroal_jax.checkpoint.safetensors import read_header
from neuroal_jax.checkpoint.tensors import FLOAT_DTYPES, TensorInfo, TensorSource, combine, digests, parameter_names
from neuroal_jax.errors import UserError, shorten
from neuroal_jax.files.reading import parse_json
from neuroal_jax.files.writing import naming
from neuroal_jax.masks.patterns import NONE, KeptOf, read_pattern
from neuroal_jax.masks.wrapped import match_names

FORMAT = "neuroal-masks-1"
_ENTRY = "neuroal"
_IN_BLOCK = re.compile(r"(?:^|\.)\d+\.")  # the number of a block, in the name of a tensor


@dataclass(frozen=True)
class PackedMasks:
    """Packed masks and what they belong to.

    Attributes:
        packed: uint8 `[out, ceil(in / 8)]` by Hugging Face name.
        widths: Number of inputs of each linear.
        kept_zeros: Number of kept weights that are zero anyway, where there are any: because they were in the source,
            or because an update rounded them to zero.
        source: SHA-256 of the source's prunable weights.
        metadata: Everything else that the file records, as text.
    """

    packed: Mapping[str, np.ndarray]
    widths: Mapping[str, int]
    kept_zeros: Mapping[str, int]
    source: str
    metadata: Mapping[str, str]

    @property
    def updated_weights(self) -> bool:
        """Whether the pruner changed kept weights too, so that masks alone do not hold its result."""
        return self.metadata.get("weights") == "updated"

    @property
    def pattern(self) -> KeptOf | None:
        """How many of every few neighbours stay; None where these are no sets of competitors."""
        return read_pattern(self.metadata.get("pattern", NONE))

    def mask(self, name: str) -> np.ndarray:
        """One mask, bool `[out, in]`, True = kept."""
        return np.unpackbits(self.packed[name], axis=1, count=self.widths[name]).astype(bool)

    def zeros(self) -> int:
        """Number of pruned weights."""
        return sum(self.packed[name].shape[0] * width for name, width in self.widths.items()) - sum(
            int(np.bitwise_count(packed).sum()) for packed in self.packed.values()
        )

    def prune(self, name: str, weight: np.ndarray) -> np.ndarray:
        """A copy of a weight `[out, in]` with zeros where the mask prunes, in its own dtype."""
        pruned = np.array(weight)
        pruned[~self.mask(name)] = 0
        return pruned


def save_masks(path: Path, masks: PackedMasks) -> None:
    """Writes a mask file."""
    header = {
        "format": FORMAT,
        "source": masks.source,
        "widths": dict(masks.widths),
        "kept_zeros": dict(masks.kept_zeros),
        "run": dict(masks.metadata),
    }
    # One entry only: the library writes several in a different order each time, and equal masks shall be equal files.
    metadata = {_ENTRY: json.dumps(header, sort_keys=True)}
    with naming(path):
        save_file({name: np.ascontiguousarray(bits) for name, bits in masks.packed.items()}, path, metadata=metadata)


def is_masks(path: Path) -> bool:
    """Whether a file says of itself that it holds masks, whole or not."""
    try:
        with safe_open(path, framework="np") as file:
            return _ENTRY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def read_masks(path: Path) -> PackedMasks:
    """Reads a mask file.

    Raises:
        UserError: If the file is not a complete, consistent mask file.
    """
    try:
        read_header(path)  # stricter than the library about names
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (UserError, OSError, SafetensorError, AttributeError, TypeError) as error:  # the last two: odd dtypes
        raise UserError(f"{path} is not a readable mask file ({error})") from error
    header = _read_header(path, metadata)
    widths = _read_counts(path, header, "widths")
    kept_zeros = _read_counts(path, header, "kept_zeros")
    if set(widths) != set(packed) or not set(kept_zeros) <= set(packed):
        raise UserError(f"{path}: its widths and its tensors are of different names: the file is damaged")
    if not packed:
        raise UserError(f"{path} holds no masks")
    for name, bits in packed.items():
        expected = -(-widths[name] // 8)
        if bits.dtype != np.uint8 or bits.ndim != 2 or bits.shape[1] != expected:
            raise UserError(
                f"{path}: {name} is {bits.dtype} {list(bits.shape)}, expected uint8 [out, {expected}] "
                f"for {widths[name]} inputs"
            )
        if widths[name] % 8 and (bits[:, -1] & (0xFF >> widths[name] % 8)).any():
            raise UserError(f"{path}: {name} has bits set beyond its {widths[name]} inputs: the file is damaged")
        kept = int(np.bitwise_count(bits).sum())
        if kept_zeros.get(name, 0) > kept:
            raise UserError(f"{path}: {name} keeps {kept} weights, of which {kept_zeros[name]} cannot be zero")
    run = header.get("run")
    if not isinstance(run, dict) or not all(isinstance(value, str) for value in run.values()):
        raise UserError(f"{path}: 'run' of its metadata is missing or damaged")
    try:
        read_pattern(run.get("pattern", NONE))
    except ValueError as error:
        raise UserError(f"{path}: 'pattern' of its metadata is damaged ({error})") from error
    return PackedMasks(packed, widths, kept_zeros, str(header.get("source")), run)


def masks_of(path: Path, source: TensorSource, model: str) -> PackedMasks:
    """Reads the masks that turn the weights of `source` into the pruned ones.

    Raises:
        UserError: If the file is no mask file, its masks were computed from other weights, or kept weights changed too.
    """
    masks = read_masks(path)
    if masks.updated_weights:
        raise UserError(
            f"{path} alone does not hold the result, its pruner changed the kept weights too: use the model that "
            "the run saved (--save-model; by default the directory 'model' beside the masks)"
        )
    check_source(masks, source, model)
    return masks


def load_masks(path: str | Path) -> dict[str, np.ndarray]:
    """All masks of a file, unpacked: one byte a weight.

    Args:
        path: `masks.safetensors` of a run.

    Returns:
        bool `[out, in]`, True = kept, by Hugging Face parameter name: in the orientation of a torch weight.

    Raises:
        UserError: If the file is not a complete, consistent mask file.

    Example:
        >>> import tempfile, neuroal_jax
        >>> config = neuroal_jax.PruneConfig(
        ...     model="demo", sparsity=0.7, allocation="uniform", nsamples=4, eval="none", out=tempfile.mkdtemp()
        ... )
        >>> masks = neuroal_jax.load_masks(neuroal_jax.prune(config).out / "masks.safetensors")
        >>> mask = masks["model.layers.0.self_attn.q_proj.weight"]
        >>> mask.shape, mask.dtype, round(1 - float(mask.mean()), 3)
        ((128, 128), dtype('bool'), 0.7)
    """
    masks = read_masks(Path(path))
    return {name: masks.mask(name) for name in masks.packed}


def _read_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        header = parse_json(metadata.get(_ENTRY, "{}"))
    except ValueError as error:
        raise UserError(f"{path}: its metadata is damaged ({error})") from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: format is {found!r}, expected {FORMAT!r}: not a mask file")
    return header


def _read_counts(path: Path, header: Mapping[str, Any], key: str) -> dict[str, int]:
    counts = header.get(key)
    if not isinstance(counts, dict) or not all(type(n) is int and 0 <= n < 2**40 for n in counts.values()):
        raise UserError(f"{path}: '{key}' of its metadata is missing or damaged")
    return counts


def kept_sha256(packed: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of packed masks in the order of their names; that names begin otherwise makes no difference."""
    digest = hashlib.sha256()
    for name in sorted(packed):
        digest.update(np.ascontiguousarray(packed[name]).data)
    return digest.hexdigest()


def in_block(name: str) -> bool:
    """Whether a tensor lies in a block, by its name."""
    return _IN_BLOCK.search(name) is not None


def uncovered(places: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """What is wrong where masks are not those of all linears of a model's blocks, and of nothing else.

    The linears of a block are, in all families, its weights of two axes: with a block's number in their names. What
    lies below a masked linear was added to it (an adapter), and is no linear of the model.

    Args:
        places: By name of a mask, the name of its weight in the model.
        shapes: Of all tensors or parameters of the model, by name.
    """
    numbered = {name: _IN_BLOCK.search(place) for name, place in places.items()}
    blocks = tuple({match.string[: match.start()] for match in numbered.values() if match})
    masked = tuple(place.removesuffix("weight").removesuffix("base_layer.") for place in places.values())
    linears = [name for name, shape in shapes.items() if len(shape) == 2 and in_block(name)]
    lacking = [name for name in linears if name.startswith(blocks) and not name.startswith(masked)]
    others = [name for name, match in numbered.items() if not match]
    return [f"{name} has no mask" for name in lacking] + [f"{name} is no linear of a block" for name in others]


def check_fit(masks: PackedMasks, infos: Mapping[str, TensorInfo], model: str) -> None:
    """Raises UserError unless every mask has a linear of its shape, and every linear a mask."""
    problems = uncovered({name: name for name in masks.packed}, {name: x.shape for name, x in infos.items()})
    for name, packed in masks.packed.items():
        shape = (packed.shape[0], masks.widths[name])
        if name not in infos:
            problems.append(f"{name} is not in the model")
        elif infos[name].shape != shape:
            problems.append(f"{name} has shape {list(infos[name].shape)}, the mask {list(shape)}")
        elif infos[name].dtype not in FLOAT_DTYPES:
            problems.append(f"{name} has dtype {infos[name].dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
    if problems:
        wrapped = sorted(set(match_names(masks.packed, infos).values()) - set(masks.packed))
        hint = f" (it was saved inside a wrapper, see {wrapped[0]}: save the model itself)" if wrapped else ""
        raise UserError(f"the masks are of another model than {model}: {shorten(problems)}{hint}")


def check_source(masks: PackedMasks, source: TensorSource, model: str) -> None:
    """Raises UserError unless `source` holds the very weights that the masks were computed from."""
    source.rename(parameter_names(source.infos, masks.packed))
    check_fit(masks, source.infos, model)
    if combine(digests(masks.packed, source.infos, source.read)) != masks.source:
        raise UserError(
            f"{model} has other weights than the masks were computed from "
            f"(expected prunable SHA-256 {masks.source[:16]}...): use the checkpoint that was pruned"
        )


def check_pruned(masks: PackedMasks, source: TensorSource, model: str, *, exact: bool = True) -> dict[str, int]:
    """`check_zeros` of a checkpoint; raises UserError too if the masks are not of such a model."""
    source.rename(parameter_names(source.infos, masks.packed))
    check_fit(masks, source.infos, model)
    return check_zeros(masks, lambda name: source.read(name) == 0, model, exact=exact)


def check_zeros(
    masks: PackedMasks, zero: Callable[[str], np.ndarray], model: str, *, exact: bool = True
) -> dict[str, int]:
    """Checks that every weight that the masks prune is zero, and that their groups are those of their pattern.

    Args:
        masks: Masks that fit the model.
        zero: From a tensor's name to bool `[out, in]`, True where the weight is zero.
        model: What to call the model.
        exact: Whether the kept weights that are zero anyway must be as many as the masks say. Only fine-tuning
            changes their number.

    Returns:
        Number of kept weights that are zero anyway, by tensor, where there are any.

    Raises:
        UserError: Naming the tensors that differ.
    """
    kept_zeros, problems = {}, []
    for name in masks.packed:
        mask, zeros = masks.mask(name), zero(name)
        kept_zeros[name] = int(np.count_nonzero(mask & zeros))
        if problem := pruned_problem(mask, zeros, masks.kept_zeros.get(name, 0) if exact else kept_zeros[name]):
            problems.append(f"{name} {problem}")
        if masks.pattern is not None and (problem := group_problem(mask, masks.pattern)):
            problems.append(f"{name} {problem}")
    if masks.pattern is not None and not problems:
        problems = uneven_blocks(masks, masks.pattern)
    if problems:
        raise UserError(f"{model} is not what the masks describe: {shorten(problems)}")
    return {name: count for name, count in kept_zeros.items() if count}


def uneven_blocks(masks: PackedMasks, asked: KeptOf) -> list[str]:
    """What is wrong where linears of a block keep different numbers, of masks whose groups are alike in each linear."""
    problems = []
    firsts: dict[str, tuple[str, int]] = {}
    for name, packed in masks.packed.items():
        weights = packed.shape[0] * masks.widths[name]
        if not weights:
            continue
        kept, match = int(np.bitwise_count(packed).sum()) * asked.size // weights, _IN_BLOCK.search(name)
        first, expected = firsts.setdefault(name[: match.end()] if match else name, (name, kept))
        if kept != expected:
            problems.append(f"{name} keeps {kept} of {asked.size}, but {first}, in the same block, {expected}")
    return problems


def pruned_problem(mask: np.ndarray, zero: np.ndarray, kept_zeros: int) -> str | None:
    """What is wrong with a weight's zeros, given its mask; None if they match.

    Args:
        mask: bool `[out, in]`, True = kept.
        zero: bool `[out, in]`, True where the weight is zero.
        kept_zeros: Number of kept weights that are zero anyway.
    """
    alive = int(np.count_nonzero(~mask & ~zero))
    if alive:
        return f"has {alive} nonzero weights that the mask prunes"
    extra = int(np.count_nonzero(mask & zero))
    if extra != kept_zeros:
        return f"has {extra} zeros that the mask keeps, expected {kept_zeros}"
    return None


def group_problem(mask: np.ndarray, asked: KeptOf) -> str | None:
    """What is wrong with a mask `[out, in]`, True = kept, whose groups are to keep equally many; None if nothing is."""
    if not mask.size:
        return None
    if mask.shape[1] % asked.size:
        return f"has {mask.shape[1]} inputs, which are no whole groups of {asked.size}"
    kept = mask.reshape(-1, asked.size).sum(axis=1)
    least, most = int(kept.min()), int(kept.max())
    if least != most or asked.kept not in (None, least):
        found = str(least) if least == most else f"{least} to {most}"
        return f"keeps {found} of {asked.size} in its groups, not {asked}"
    return None
