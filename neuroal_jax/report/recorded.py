"""What a run recorded, of this version or an earlier one, as the report needs it. Imports neither JAX nor Plotly."""

import math
import re
from collections.abc import Mapping
from typing import Any

from neuroal_jax.errors import UserError
from neuroal_jax.search.lambdas import lambdas_for

FORMAT = "neuroal-manifest-1"
Manifest = Mapping[str, Any]
PerLinear = list[dict[str, Any]]  # per block, a value for each linear
Candidates = dict[str, list[dict[str, Any]]]  # by step, in order: parameters by name, and the `score`

_TENSOR = re.compile(r"^(?:.*?\.)?(\d+)\.(.+?)(?:\.weight)?$", re.DOTALL)


def recorded_candidates(manifest: Manifest) -> Candidates:
    """The candidates of every step of a search, with their parameters and scores.

    Manifests of earlier versions hold scores alone; which lambdas they belong to follows from the options, and where
    these say nothing that is known, the candidates have no parameters.
    """
    if "candidates" in manifest:
        return manifest["candidates"]
    lambdas = _lambdas_of_options(manifest)
    return {
        step: [{"lambda": x, "score": score} for x, score in zip(lambdas[step], scores, strict=True)]
        if len(lambdas.get(step, ())) == len(scores)
        else [{"score": score} for score in scores]
        for step, scores in manifest.get("scores", {}).items()
        if scores
    }


def recorded_winners(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """The winner's parameters of every step that was searched."""
    if "chosen" in manifest:
        return manifest["chosen"]
    lambdas = {step: manifest.get(f"lambda_{step}") for step in manifest.get("scores", {})}
    return {step: {"lambda": x} for step, x in lambdas.items() if x is not None}


def _lambdas_of_options(manifest: Manifest) -> dict[str, tuple[float, ...]]:
    options = manifest.get("options", {})
    sets = [options.get("block_lambdas"), options.get("row_lambdas")]
    if not all(isinstance(x, list) or x in ("paper", "reference") for x in sets):
        return {}
    block, row = (x if isinstance(x, str) else tuple(x) for x in sets)
    lambdas = lambdas_for(options.get("step", "both"), block, row, manifest["sparsity"]["requested"])
    return {"block": lambdas.block, "row": lambdas.row}


def per_linear(tensors: Mapping[str, Any]) -> PerLinear:
    """Regroups values by tensor name (`model.layers.3.mlp.up_proj.weight`) as one object per block, linears by name.

    Raises:
        UserError: If a name holds no number of a block, or the blocks are not 0, 1, 2 and so on.
    """
    blocks: dict[int, dict[str, Any]] = {}
    for tensor, value in tensors.items():
        match = _TENSOR.match(tensor)
        if match is None:
            raise UserError(
                f"the allocation names {tensor}, expected a linear of a block, as model.layers.0.mlp.up_proj"
            )
        blocks.setdefault(int(match[1]), {})[match[2]] = value
    if not blocks or sorted(blocks) != list(range(len(blocks))):
        raise UserError(f"the allocation has blocks {sorted(blocks)[:5]}..., expected all from 0 on")
    return [blocks[index] for index in range(len(blocks))]


def achieved(manifest: Manifest) -> PerLinear:
    """Share of zeros in every linear, per block."""
    shapes = manifest["linears"]
    return [
        {linear: zeros / math.prod(shapes[linear]) for linear, zeros in block.items()}
        for block in manifest["zeros_per_linear"]
    ]
