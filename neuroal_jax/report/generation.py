"""Tokens per second in a run's page: what `eval.generation` left beside the run. Imports neither JAX nor Plotly."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import number, read_json
from neuroal_jax.masks.file import kept_sha256, read_masks

FORMAT = "neuroal-generation-1"
GENERATION = "generation.json"  # beside a run's manifest
_MOST_BYTES = 2**28  # more than any such file has
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


def is_of_run(found: Mapping[str, Any], run: Path) -> bool:
    """Whether figures are those of the model that the masks of a run's directory describe.

    Of a saved model, masks do not tell which of the kept weights are zero too; where there are some, numbers decide.

    Raises:
        KeyError, TypeError: If the content is none of this version.
        UserError: If the masks cannot be read.
    """
    masks = read_masks(run / "masks.safetensors")
    if found["masks"] is None and masks.kept_zeros:
        return bool(found["sparsity"]["zeros"] == masks.zeros() + sum(masks.kept_zeros.values()))
    return bool(found["kept_sha256"] == kept_sha256(masks.packed))


def generation_of(run: Path) -> GenerationTable | None:
    """The figures of the generation.json in a run's directory for its page, if it is there and of this run's model.

    Raises:
        UserError: If it is damaged, or the masks are.
    """
    path = run / GENERATION
    if not os.path.lexists(path):
        return None
    try:
        found = read_json(path, _MOST_BYTES)
        if found["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        if not is_of_run(found, run):
            other = f"{GENERATION} was measured on another model than this run's: measure it again."
            return GenerationTable(other, [], [], [])
        return generation_table(found)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): measure it again, or remove it") from error


def generation_table(found: Mapping[str, Any]) -> GenerationTable:
    """Figures for a run's page.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: If the content is none of this version.
    """
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
