"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neuroal_jax.models import gated, hf_config

WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


def parse_config(config: Mapping[str, Any]) -> gated.GatedConfig:
    """Reads config.json, refusing what is not implemented."""
    hf_config.refuse_windows(config)
    return replace(gated.parse(config, WINDOW_KEYS, max_positions=32768), qkv_bias=True)


FAMILY = gated.family("qwen2", "Qwen2ForCausalLM", parse_config)
