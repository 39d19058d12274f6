"""Tokens per second in a run's page: what `eval.generation` left beside the run. Imports neither JAX nor Plotly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neuroal_jax.files.reading import number
from neuroal_jax.report.recorded import Manifest

FORMAT = "neuroal-generation-1"
GENERATION = "generation.json"  # beside a run's manifest
_NAMES = {
    "dense_fp32": "dense, fp32",
    "dense_bf16": "dense, bf16",
    "dense_fp16": "dense, fp16",
    "control": "pruned, dense tensors",
    "csr": "pruned, CSR",
    "semi_structured": "pruned, 2:4",
}


@dataclass(frozen=True)
class GenerationTable:
    """A table with text cells, a sentence above it, and what to be careful with below."""

    sentence: str
    head: list[str]
    rows: list[list[str]]
    cautions: list[str]


def generation_table(found: Mapping[str, Any], manifest: Manifest) -> GenerationTable:
    """The figures of generation.json for a run's page; none of them if they are of another model than the run's.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: If the content is none of this version.
    """
    if found["sparsity"]["zeros"] != manifest["sparsity"]["zeros"]:
        other = f"{GENERATION} was measured on another model than this run's: measure it again."
        return GenerationTable(other, [], [], [])
    variants, machine = found["variants"], found["machine"]
    baselines = list(dict.fromkeys(baseline for variant in variants.values() for baseline in variant["ratios"]))
    head = ["variant", "prefill tok/s", "decode tok/s", *(f"decode to {_name(baseline)}" for baseline in baselines)]
    rows = [[_name(name), *_cells(variant, baselines)] for name, variant in variants.items()]
    sentence = (
        f"Greedy generation by PyTorch {found['versions']['torch']} and transformers, not by the paper's engine: "
        f"{found['prompt']['tokens']} prompt tokens, {found['new_tokens']} new ones; medians of {found['repeats']} "
        f"repeats, threads: {machine['threads']}, on {machine['gpu'] or machine['cpu']}. "
    )
    same = found["same_tokens"]
    pair = " and ".join(map(_name, same["variants"]))
    if same["equal"]:
        sentence += f"The tokens of {pair} are the same."
    else:
        sentence += f"The tokens of {pair} differ from new token {same['first_difference']['position']} on."
    unreliable = [f"unreliable: {reason}" for reason in found["unreliable"]]
    return GenerationTable(sentence, [*head, "MiB"], rows, [*found["warnings"], *unreliable])


def _name(variant: str) -> str:
    return _NAMES.get(variant, variant)


def _cells(variant: Mapping[str, Any], baselines: list[str]) -> list[str]:
    rates = [variant[phase]["tokens_per_second"] for phase in ("prefill", "decode")]
    quotients = [variant["ratios"][baseline]["decode"] for baseline in baselines]
    return [f"{number(value):.2f}" for value in (*rates, *quotients)] + [f"{number(variant['bytes']) / 2**20:.1f}"]
