"""SmolLM3: Llama without rotary positions in every fourth block."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neuroal_jax.errors import UserError
from neuroal_jax.models import gated, hf_config
from neuroal_jax.models.qwen2 import WINDOW_KEYS

_KEYS = ("attention_bias", "mlp_bias", "no_rope_layer_interval", "no_rope_layers", *WINDOW_KEYS)


def parse_config(config: Mapping[str, Any]) -> gated.GatedConfig:
    """Reads config.json, refusing what is not implemented."""
    bias = hf_config.take_bool(config, "attention_bias", False)
    parsed = gated.parse(config, _KEYS, tied=True, kv_heads=4, max_positions=32768, theta=2e6)
    rotated = _rotated(config, parsed.num_hidden_layers)
    window = hf_config.take_window(config, None)
    used = window is not None and hf_config.take_bool(config, "use_sliding_window", False)
    layers = hf_config.take_windowed_layers(config, parsed.num_hidden_layers)
    without_rotation = tuple(used and not rotates for rotates in rotated)
    return replace(
        gated.windowed(parsed, window, without_rotation if layers is None else layers),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=hf_config.take_bool(config, "mlp_bias", False),
        other_ropes=(None,),
        layer_ropes=tuple(int(not rotates) for rotates in rotated),
    )


def _rotated(config: Mapping[str, Any], blocks: int) -> tuple[bool, ...]:
    """Which blocks rotate queries and keys: `no_rope_layers` has a 1 for each that does, in spite of its name."""
    interval = hf_config.take_int(config, "no_rope_layer_interval", 4)
    given = config.get("no_rope_layers")
    if given is None:
        return tuple((block + 1) % interval != 0 for block in range(blocks))
    if not isinstance(given, list) or len(given) < blocks or any(value not in (0, 1) for value in given):
        raise UserError(
            f"config.json: no_rope_layers is {str(given)[:60]}, expected {blocks} numbers: 1 for a block with rotary "
            "positions, 0 for one without"
        )
    return tuple(map(bool, given[:blocks]))


FAMILY = gated.family("smollm3", "SmolLM3ForCausalLM", parse_config)
