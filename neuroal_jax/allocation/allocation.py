"""How much of every block, linear and row is pruned: the allocation, and its file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuroal_jax.errors import UserError, shorten
from neuroal_jax.files.reading import read_json
from neuroal_jax.files.writing import write_json

FORMAT = "neuroal-allocation-1"

_MOST_BYTES = 2**30  # a list of numbers for each row of a model of 70B parameters takes a tenth
_ALPHA_LIMIT = 1000  # AlphaPruning of the released code does not keep its numbers below 1

# Sparsity of a linear: one number for all its rows, or float64 [out].
Sparsity = float | np.ndarray


@dataclass(frozen=True)
class Allocation:
    """Sparsity of every linear: `blocks[b][linear]`, with the method that decided it."""

    method: str
    blocks: tuple[dict[str, Sparsity], ...]


def uniform(sparsity: float, linears: list[str], num_blocks: int) -> Allocation:
    """The same sparsity everywhere."""
    return by_block("uniform", [sparsity] * num_blocks, linears)


def by_block(method: str, sparsities: list[float], linears: list[str]) -> Allocation:
    """One sparsity per block, shared by its linears."""
    return Allocation(method, tuple(dict.fromkeys(linears, float(s)) for s in sparsities))


def mean_sparsity(allocation: Allocation, shapes: Mapping[str, tuple[int, int]]) -> float:
    """The mean over all prunable weights."""
    pairs = [
        (float(np.mean(sparsity)), math.prod(shapes[linear]))
        for block in allocation.blocks
        for linear, sparsity in block.items()
    ]
    return sum(mean * size for mean, size in pairs) / sum(size for _, size in pairs)


def describe(allocation: Allocation, names: Mapping[str, tuple[int, str]], requested: float) -> dict[str, Any]:
    """The content of `allocation.json`: Hugging Face tensor names with a number or a list of one number per row.

    Args:
        allocation: What to describe.
        names: Block and linear of every prunable tensor, by Hugging Face name.
        requested: The sparsity of the whole model that was asked for.
    """
    sparsity = {}
    for name, (block, linear) in names.items():
        value = allocation.blocks[block][linear]
        sparsity[name] = value.tolist() if isinstance(value, np.ndarray) else value
    return {"format": FORMAT, "method": allocation.method, "requested": requested, "sparsity": sparsity}


def save_allocation(path: Path, allocation: Allocation, names: Mapping[str, tuple[int, str]], requested: float) -> None:
    """Writes `allocation.json`; see `describe`."""
    write_json(path, describe(allocation, names, requested))


def load_allocation(
    path: Path, names: Mapping[str, tuple[int, str]], shapes: Mapping[str, tuple[int, int]], num_blocks: int
) -> tuple[Allocation, float | None]:
    """Reads an allocation file.

    A key of `sparsity` is a tensor's Hugging Face name, or a prefix of whole name parts (`model.layers.3`); the longest
    match of each tensor counts.

    Returns:
        The allocation, and the sparsity of the whole model that the file says was requested, if it says so.

    Raises:
        UserError: If the file is not an allocation, does not cover every linear, or does not fit the model.
    """
    try:
        content = read_json(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"--allocation {path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"--allocation {path}: format is {found!r}, expected {FORMAT!r}")
    limit = _ALPHA_LIMIT if content.get("method") == "alpha" else 1
    entries = content.get("sparsity")
    if not isinstance(entries, dict):
        raise UserError(f"--allocation {path}: 'sparsity' is missing or not an object")
    blocks: list[dict[str, Sparsity]] = [{} for _ in range(num_blocks)]
    problems: list[str] = []
    used: set[str] = set()
    for name, (block, linear) in names.items():
        key = next((prefix for prefix in _prefixes(name) if prefix in entries), None)
        if key is None:
            problems.append(f"{name} has no entry")
            continue
        used.update(prefix for prefix in _prefixes(name) if prefix in entries)
        try:
            blocks[block][linear] = _read_sparsity(entries[key], shapes[linear][0], limit)
        except ValueError as error:
            problems.append(f"{key} {error}")
    problems += [f"{key} is no linear or block of this model" for key in entries if key not in used]
    if problems:
        raise UserError(f"--allocation {path} does not fit the model: {shorten(list(dict.fromkeys(problems)))}")
    requested = content.get("requested")
    if requested is not None and (not _is_fraction(requested) or not 0 < requested < 1):
        raise UserError(f"--allocation {path}: 'requested' is {requested!r}, expected a number between 0 and 1")
    method = content.get("method")
    return Allocation(method if isinstance(method, str) else "file", tuple(blocks)), requested


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _is_fraction(value: Any, limit: float = 1) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= limit


def _read_sparsity(value: Any, rows: int, limit: float) -> Sparsity:
    if _is_fraction(value, limit):
        return float(value)
    if not isinstance(value, list):
        raise ValueError(f"is {value!r}, expected a number between 0 and 1 or a list of them")
    if len(value) != rows:
        raise ValueError(f"lists {len(value)} rows, expected {rows}")
    if not all(_is_fraction(item) for item in value):
        raise ValueError("lists something other than numbers between 0 and 1")
    return np.array(value, dtype=np.float64)
