"""The registry of model families, keyed by Hugging Face's `model_type`."""

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from neuroal_jax.errors import UserError
from neuroal_jax.models.family import Family
from neuroal_jax.models.hf_config import refuse_moe

# model_type -> module with a FAMILY. Imported on use: reading a plan or a mask file needs no JAX.
FAMILIES = {
    "gemma": "neuroal_jax.models.gemma",
    "gemma2": "neuroal_jax.models.gemma2",
    "llama": "neuroal_jax.models.llama",
    "mistral": "neuroal_jax.models.mistral",
    "opt": "neuroal_jax.models.opt",
    "phi": "neuroal_jax.models.phi",
    "qwen2": "neuroal_jax.models.qwen2",
    "qwen3": "neuroal_jax.models.qwen3",
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
        close = difflib.get_close_matches(model_type, FAMILIES, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UserError(f"model_type '{model_type}' is not supported, expected one of {', '.join(FAMILIES)}{hint}")
    family: Family = import_module(FAMILIES[model_type]).FAMILY
    architectures = config.get("architectures") or list(family.architectures)
    if not isinstance(architectures, list) or any(name not in family.architectures for name in architectures):
        raise UserError(
            f"config.json: architectures {architectures!r} is not supported, expected {list(family.architectures)}"
        )
    if config.get("auto_map"):
        raise UserError(
            "config.json: auto_map is set: the checkpoint brings its own modelling code, which is never run"
        )
    return family
