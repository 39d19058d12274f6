"""Qwen3: Llama with normalised queries and keys, and heads of a size of their own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neuroal_jax.models import gated, hf_config
from neuroal_jax.models.qwen2 import WINDOW_KEYS, windowed


def parse_config(config: Mapping[str, Any]) -> gated.GatedConfig:
    """Reads config.json, refusing what is not implemented."""
    bias = hf_config.take_bool(config, "attention_bias", False)
    parsed = gated.parse(config, ("attention_bias", *WINDOW_KEYS), head_dim=128, kv_heads=32, max_positions=32768)
    return replace(windowed(config, parsed), qkv_bias=bias, o_bias=bias, qk_norm="head")


FAMILY = gated.family("qwen3", "Qwen3ForCausalLM", parse_config)
