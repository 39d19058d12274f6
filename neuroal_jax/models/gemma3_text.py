"""Gemma 3: Gemma 2 with normed queries and keys, and a rotation of their own for the blocks with a window.

These are the text models (270M, 1B). The larger ones bring a vision model along, and are refused.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neuroal_jax.models import gated, gemma2, hf_config
from neuroal_jax.models.rope import rope_of_layer_type, take_rope

# The first is not used: as transformers computes the model, only the logits can have a softcap.
_KEYS = ("attn_logit_softcapping", "attention_bias", "final_logit_softcapping")


def parse_config(config: Mapping[str, Any]) -> gated.GatedConfig:
    """Reads config.json, refusing what is not implemented."""
    bias = hf_config.take_bool(config, "attention_bias", False)
    full = rope_of_layer_type(config, "full_attention", theta_key="rope_theta", theta=1e6, scaled=True)
    local = rope_of_layer_type(config, "sliding_attention", theta_key="rope_local_base_freq", theta=1e4, scaled=False)
    keys = (*_KEYS, "query_pre_attn_scalar", "rope_local_base_freq", "sliding_window", "sliding_window_pattern")
    parsed = gated.parse(
        full,
        keys,
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        tied=True,
        head_dim=256,
        kv_heads=4,
        max_positions=131072,
    )
    blocks = parsed.num_hidden_layers
    pattern = hf_config.take_int(config, "sliding_window_pattern", 6)
    layers = hf_config.take_windowed_layers(config, blocks)
    layers = tuple((block + 1) % pattern != 0 for block in range(blocks)) if layers is None else layers
    return replace(
        gated.windowed(parsed, hf_config.take_window(config, 4096), layers),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        unit_offset=True,
        norms=gemma2.NORMS,
        embedding_scale=parsed.hidden_size**0.5,
        scale=hf_config.take_float(config, "query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=hf_config.take_optional_float(config, "final_logit_softcapping"),
        other_ropes=(take_rope(local, parsed.head_dim, parsed.max_position_embeddings),),
        layer_ropes=tuple(int(local) for local in layers),
    )


FAMILY = gated.family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    parse_config,
    bos_every_window=True,
)
