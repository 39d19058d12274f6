"""manifest.json: everything needed to know, compare and repeat a run."""

import importlib.metadata
import platform
import resource
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

from neuroal_jax import __version__
from neuroal_jax.checkpoint.opened import Checkpoint
from neuroal_jax.data.windows import Windows
from neuroal_jax.run.plan import Plan
from neuroal_jax.search.search import Found
from neuroal_jax.walk.blocks import BlockResult

FORMAT = "neuroal-manifest-1"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax", "safetensors", "transformers", "datasets")


def versions() -> dict[str, str]:
    """Versions of this package, Python and the packages that results depend on."""
    found = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {"neuroal_jax": __version__, "python": platform.python_version(), **found}


def describe_windows(windows: Windows | None) -> dict[str, Any] | None:
    """Where token windows come from, how many, how long; the tokenizer, and where it puts a BOS; hashes."""
    if windows is None:
        return None
    count, seqlen = windows.ids.shape
    return {
        "origin": windows.origin,
        "windows": count,
        "seqlen": seqlen,
        "starts_with_bos": windows.starts_with_bos,
        "bos": windows.bos,
        "tokenizer": windows.tokenizer,
        "text_sha256": windows.text_sha256,
        "sha256": windows.sha256,
    }


def describe_perplexities(
    found: Mapping[str, Mapping[str, float]], windows: Mapping[str, Windows], seqlen: int
) -> dict[str, Any]:
    """Token perplexities: `dense` and `pruned` of the first text, and all `texts` by label with what they are."""
    texts = {name: {**found[name], **(describe_windows(windows[name]) or {})} for name in found}
    first: Mapping[str, Any] = next(iter(texts.values()), {})
    return {"dense": first.get("dense"), "pruned": first.get("pruned"), "seqlen": seqlen, "texts": texts}


def describe_search(found: Found) -> dict[str, Any]:
    """The chosen lambdas, every candidate's score in order, the winner's alignment, and what OWL or Alpha measured."""
    return {
        "lambda_block": found.lambda_block,
        "lambda_row": found.lambda_row,
        "scores": {"block": found.scores_block, "row": found.scores_row},
        "alignment": found.alignment,
        "measured": found.measured,
    }


def describe_damping(blocks: list[BlockResult]) -> list[dict[str, float]]:
    """Per block, what the Hessian of each linear's input was damped with; empty for pruners without one."""
    return [block.damping for block in blocks if block.damping]


def describe_machine(plan: Plan, traces: Counter[str]) -> dict[str, Any]:
    """The device, how the work was cut for it, and what it took."""
    return {
        "device": jax.local_devices()[0].device_kind,
        "candidate_batch": plan.candidate_batch,
        "traces": dict(traces),
        "memory_bytes": {
            "planned_device_peak": plan.device_peak,
            "planned_host_peak": plan.host_peak,
            "device_peak": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
            "host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
    }


def describe_hashes(
    checkpoint: Checkpoint, weights: Mapping[str, str], data: Mapping[str, Windows | None]
) -> dict[str, Any]:
    """SHA-256 of the weights (all, and the prunable ones), of config.json and of the tokens used."""
    tokens = {name: None if windows is None else windows.sha256 for name, windows in data.items()}
    return {**weights, "config": checkpoint.config_file.sha256, **tokens}
