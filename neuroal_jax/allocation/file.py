"""allocation.json: what every method writes, and reads back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from neuroal_jax.allocation import ALLOCATIONS
from neuroal_jax.allocation.allocation import Allocation, Sparsity
from neuroal_jax.errors import UserError, shorten
from neuroal_jax.files.reading import read_json
from neuroal_jax.files.writing import write_json

FORMAT = "neuroal-allocation-1"

_MOST_BYTES = 2**30  # a list of numbers for each row of a model of 70B parameters takes a tenth


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
    method = content.get("method", "file")
    if not isinstance(method, str):
        raise UserError(f"--allocation {path}: 'method' is {method!r}, expected a name")
    limit = ALLOCATIONS[method].highest if method in ALLOCATIONS else 1
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
    return Allocation(method, tuple(blocks)), requested


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
