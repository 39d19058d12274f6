"""The registry of model families, keyed by Hugging Face's `model_type`."""

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from neuroal_jax.errors import UserError
from neuroal_jax.models.family import Family
from neuroal_jax.models.hf_config import note_code, refuse_moe, transformers
from neuroal_jax.models.unsupported import refusal

# model_type -> module with a FAMILY. Imported on use: reading a plan or a mask file needs no JAX.
FAMILIES = {
    "gemma": "neuroal_jax.models.gemma",
    "gemma2": "neuroal_jax.models.gemma2",
    "gemma3_text": "neuroal_jax.models.gemma3_text",
    "gpt_neox": "neuroal_jax.models.gpt_neox",
    "granite": "neuroal_jax.models.granite",
    "llama": "neuroal_jax.models.llama",
    "mistral": "neuroal_jax.models.mistral",
    "olmo2": "neuroal_jax.models.olmo2",
    "opt": "neuroal_jax.models.opt",
    "phi": "neuroal_jax.models.phi",
    "phi3": "neuroal_jax.models.phi3",
    "qwen2": "neuroal_jax.models.qwen2",
    "qwen3": "neuroal_jax.models.qwen3",
    "smollm3": "neuroal_jax.models.smollm3",
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that implements a config.json.

    Raises:
        UserError: If no family implements its `model_type` and `architectures`, or if it is a mixture of experts.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"config.json: model_type is {model_type!r}, expected one of {', '.join(FAMILIES)}")
    refuse_moe(config)
    if model_type not in FAMILIES:
        raise UserError(refusal(config, FAMILIES))
    family: Family = import_module(FAMILIES[model_type]).FAMILY
    _check_architectures(config.get("architectures") or [], family)
    note_code(config)
    return family


def _check_architectures(architectures: Any, family: Family) -> None:
    """Raises UserError if `architectures` names a class of transformers for another model or another task.

    transformers goes by `model_type` alone, so the names of classes that it does not have (`LLaMAForCausalLM`,
    `YiForCausalLM`) do not matter.
    """
    own = {name.lower() for name in family.architectures}
    bare = {name.removesuffix("forcausallm") for name in own}
    own |= {name + suffix for name in bare for suffix in ("model", "textmodel")}  # files of a model without its head
    for name in architectures if isinstance(architectures, list) else [architectures]:
        other = not isinstance(name, str) or re.search("For(?!CausalLM)[A-Z]", name)
        if other or (name.lower() not in own and name in dir(transformers())):
            raise UserError(
                f"config.json: architectures {architectures!r} is not supported, expected {list(family.architectures)}"
            )
