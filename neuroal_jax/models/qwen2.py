"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neuroal_jax.models import gated, hf_config

WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers")


def parse_config(config: Mapping[str, Any]) -> gated.GatedConfig:
    """Reads config.json, refusing what is not implemented."""
    return replace(windowed(config, gated.parse(config, WINDOW_KEYS, kv_heads=32, max_positions=32768)), qkv_bias=True)


def windowed(config: Mapping[str, Any], parsed: gated.GatedConfig) -> gated.GatedConfig:
    """Adds the sliding windows: of the blocks after `max_window_layers`, unless `layer_types` says which."""
    used = hf_config.take_bool(config, "use_sliding_window", False)
    window, blocks = hf_config.take_window(config, 4096) if used else None, parsed.num_hidden_layers
    first = hf_config.take_int(config, "max_window_layers", 28, low=0)
    layers = hf_config.take_windowed_layers(config, blocks)
    after = tuple(window is not None and block >= first for block in range(blocks))
    return gated.windowed(parsed, window, after if layers is None else layers)


FAMILY = gated.family("qwen2", "Qwen2ForCausalLM", parse_config)
