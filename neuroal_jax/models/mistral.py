"""Mistral: Llama with a sliding window, or without one."""

from collections.abc import Mapping
from typing import Any

from neuroal_jax.models import gated, hf_config


def parse_config(config: Mapping[str, Any]) -> gated.GatedConfig:
    """Reads config.json, refusing what is not implemented."""
    parsed = gated.parse(config, ("sliding_window",), kv_heads=8, max_positions=131072)
    window, blocks = hf_config.take_window(config, 4096), parsed.num_hidden_layers
    layers = hf_config.take_windowed_layers(config, blocks)
    return gated.windowed(parsed, window, (window is not None,) * blocks if layers is None else layers)


FAMILY = gated.family(
    "mistral",
    "MistralForCausalLM",
    parse_config,
    reference_uniform=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)
