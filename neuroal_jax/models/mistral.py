"""Mistral: Llama with a sliding window, or without one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neuroal_jax.models import gated, hf_config


def parse_config(config: Mapping[str, Any]) -> gated.GatedConfig:
    """Reads config.json, refusing what is not implemented."""
    window = None if config.get("sliding_window") is None else hf_config.take_int(config, "sliding_window")
    kv_heads = hf_config.take_int(config, "num_key_value_heads", 8)
    parsed = gated.parse({**config, "num_key_value_heads": kv_heads}, ("sliding_window",), max_positions=131072)
    return replace(parsed, sliding_window=window)


FAMILY = gated.family(
    "mistral",
    "MistralForCausalLM",
    parse_config,
    reference_uniform=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)
