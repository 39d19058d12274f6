"""What a run's page tells in words and numbers: names with texts, each with a longer text or a note."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuroal_jax.files.reading import number
from neuroal_jax.report.recorded import Manifest, recorded_candidates, recorded_winners

Facts = dict[str, tuple[str, str]]  # by name: a text, and a note (shown below it, or on hovering); "" for none

_OPTIONS = {
    "model": "model",
    "pruner": "pruner",
    "allocation": "allocation",
    "refinement": "refine",
    "budget": "budget",
    "seed": "seed",
    "compute dtype": "dtype",
}
_HASHED = {
    "model": "all weights",
    "prunable": "the prunable weights",
    "config": "config.json",
    "calib": "the calibration's tokens",
    "eval": "the evaluation's tokens",
}
_HASH_LENGTH = 12  # characters of a hash that are shown; the whole shows on hovering


def run_title(manifest: Manifest) -> str:
    """What was pruned, how far, and with what."""
    options = manifest["options"]
    names = ("pruner", "pattern", "allocation", "refine")
    parts = [Path(options.get(name, "none")).name for name in names]
    method = " + ".join(part for part in parts if part not in ("", "none"))
    return f"{options.get('model')} pruned to {manifest['sparsity']['requested']:.6g} sparsity with {method}"


def headline(manifest: Manifest) -> Facts:
    """The numbers to see first."""
    sparsity, token_ppl = manifest["sparsity"], manifest["token_ppl"]
    perplexity = ("not measured", "the run had --eval none")
    if token_ppl["dense"] is not None and token_ppl["pruned"] is not None:
        dense, pruned = number(token_ppl["dense"]), number(token_ppl["pruned"])
        times = f": {pruned / dense:.2f} times" if math.isfinite(dense) else ""
        perplexity = (f"{dense:.2f} \u2192 {pruned:.2f}", f"dense \u2192 pruned{times}")
    before = sparsity.get("source_zeros")  # earlier versions did not count them
    zeros = f"of {sparsity['prunable']:,} prunable weights" + (f"; {before:,} were zero before" if before else "")
    return {
        f"token_ppl@{token_ppl['seqlen']}": perplexity,
        "sparsity achieved": (f"{sparsity['achieved']:.6f}", f"{sparsity['requested']:.6g} asked"),
        "zeros": (f"{sparsity['zeros']:,}", zeros),
        "time": (f"{sum(manifest['seconds'].values()):.1f} s", f"on {manifest['device']}"),
    }


def key_facts(manifest: Manifest) -> Facts:
    """What the run did, on what, and with which data."""
    options, memory = manifest["options"], manifest["memory_bytes"]
    texts = {name: str(options[option]) for name, option in _OPTIONS.items() if option in options}
    texts |= _pattern(manifest)
    texts |= _search(manifest)
    texts["calibration"] = _windows(manifest["data"]["calib"])
    texts["evaluation"] = "; ".join(map(_windows, manifest["token_ppl"]["texts"].values())) or "none"
    if manifest["damping"]:
        most = max(x for block in manifest["damping"] for x in block.values())
        texts["damping of the Hessians"] = f"at most {most:g}"
    if records := [record for block in manifest.get("refit", ()) for record in block.values()]:
        before, after = (
            sum(record[f"error_{when}"] for record in records) / len(records) for when in ("before", "after")
        )
        texts["errors of the linears' outputs"] = f"{before:.1%} on average, {after:.1%} after the refit"
    texts["device"] = manifest["device"]
    texts["memory peak"] = f"host {_mib(memory['host_peak'])}, device {_mib(memory['device_peak'])}"
    texts["versions"] = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    hashes = {
        f"SHA-256 of {_HASHED.get(name, name)}": ("none", "") if value is None else (value[:_HASH_LENGTH], value)
        for name, value in manifest["hashes"].items()
    }
    return {**{name: (text, "") for name, text in texts.items()}, **hashes}


def option_facts(manifest: Manifest) -> Facts:
    """All options as the command line names them, with what was asked where the run settled on something else."""
    return {f"--{name.replace('_', '-')}": (_option(manifest, name), "") for name in manifest["options"]}


def _option(manifest: Manifest, name: str) -> str:
    value, asked = manifest["options"][name], manifest["asked"]
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text} (asked: {asked[name]})" if name in asked else text


def _pattern(manifest: Manifest) -> dict[str, str]:
    """How many of every few neighbours stay; earlier versions had no such groups."""
    pattern = manifest.get("pattern")
    if pattern is None:
        return {}
    least, most = min(pattern["kept"]), max(pattern["kept"])
    kept = f"{least}" if least == most else f"{least} to {most}, by block,"
    return {"pattern": f"{kept} of every {pattern['size']} neighbouring inputs stay"}


def _search(manifest: Manifest) -> dict[str, str]:
    """The winner of every step, and how much text the candidates saw."""
    candidates, winners, options = recorded_candidates(manifest), recorded_winners(manifest), manifest["options"]
    facts = {
        f"{name} of the {step} step": f"{value:g}" if isinstance(value, int | float) else str(value)
        for step, parameters in winners.items()
        for name, value in parameters.items()
    }
    facts |= {f"candidates of the {step} step": "not searched" for step in candidates if step not in winners}
    if candidates and "search_samples" in options:
        facts["sequences of the search"] = str(options["search_samples"])
    return facts


def _windows(windows: Mapping[str, Any]) -> str:
    return f"{windows['origin']}: {windows['windows']} sequences of {windows['seqlen']} tokens"


def _mib(size: int | None) -> str:
    return "not reported" if size is None else f"{size / 2**20:.0f} MiB"
