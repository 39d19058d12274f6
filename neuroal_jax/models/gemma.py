"""Gemma: Llama with scaled embeddings, norms that scale by 1 + weight, and a tied head. Wants BOS first, always."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neuroal_jax.errors import UserError
from neuroal_jax.models import gated, hf_config


def parse_config(config: Mapping[str, Any]) -> gated.GatedConfig:
    """Reads config.json, refusing what is not implemented."""
    activation = config.get("hidden_activation")
    if activation is not None and activation != config.get("hidden_act", activation):
        raise UserError(
            f"config.json: hidden_activation {activation!r} and hidden_act {config['hidden_act']!r} differ: "
            "set both to the one that the model was trained with"
        )
    bias = hf_config.take_bool(config, "attention_bias", False)
    parsed = gated.parse(
        config,
        ("attention_bias", "hidden_activation"),
        activation="gelu_pytorch_tanh",
        tied=True,
        head_dim=256,
        max_positions=8192,
    )
    scale = parsed.hidden_size**0.5
    return replace(parsed, qkv_bias=bias, o_bias=bias, unit_offset=True, embedding_scale=scale)


FAMILY = gated.family(
    "gemma",
    "GemmaForCausalLM",
    parse_config,
    bos_every_window=True,
)
