"""Gemma 2: Gemma with softcaps, norms after attention and MLP too, and a sliding window in every other block."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neuroal_jax.models import gated, hf_config

NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_KEYS = ("attention_bias", "attn_logit_softcapping", "final_logit_softcapping")


def parse_config(config: Mapping[str, Any]) -> gated.GatedConfig:
    """Reads config.json, refusing what is not implemented."""
    bias = hf_config.take_bool(config, "attention_bias", False)
    parsed = gated.parse(
        config,
        (*_KEYS, "query_pre_attn_scalar", "sliding_window"),
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        tied=True,
        head_dim=256,
        kv_heads=4,
        max_positions=8192,
    )
    blocks = parsed.num_hidden_layers
    layers = hf_config.take_windowed_layers(config, blocks) or tuple(block % 2 == 0 for block in range(blocks))
    parsed = gated.windowed(parsed, hf_config.take_window(config, 4096), layers)
    return replace(
        parsed,
        qkv_bias=bias,
        o_bias=bias,
        unit_offset=True,
        norms=NORMS,
        embedding_scale=parsed.hidden_size**0.5,
        scale=hf_config.take_float(config, "query_pre_attn_scalar", 256) ** -0.5,
        softcap=hf_config.take_optional_float(config, "attn_logit_softcapping", 50.0),
        logit_softcap=hf_config.take_optional_float(config, "final_logit_softcapping", 30.0),
    )


FAMILY = gated.family(
    "gemma2",
    "Gemma2ForCausalLM",
    parse_config,
    bos_every_window=True,
)
