"""Llama 1, 2 and 3."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neuroal_jax.models import gated, hf_config


def parse_config(config: Mapping[str, Any]) -> gated.GatedConfig:
    """Reads config.json, refusing what is not implemented."""
    bias = hf_config.take_bool(config, "attention_bias", False)
    parsed = gated.parse(config, ("attention_bias", "mlp_bias"))
    hf_config.refuse_windows(config, parsed.num_hidden_layers)
    return replace(
        parsed,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=hf_config.take_bool(config, "mlp_bias", False),
    )


FAMILY = gated.family("llama", "LlamaForCausalLM", parse_config)
