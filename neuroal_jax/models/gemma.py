"""Gemma: Llama with scaled embeddings, norms that scale by 1 + weight, and a tied head. Wants BOS first, always."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neuroal_jax.errors import UserError
from neuroal_jax.models import gated, hf_config


def parse_config(config: Mapping[str, Any]) -> gated.GatedConfig:
    """Reads config.json, refusing what is not implemented."""
    bias = hf_config.take_bool(config, "attention_bias", False)
    parsed = gated.parse(
        {**config, "hidden_act": _activation(config)},
        ("attention_bias", "hidden_activation"),
        tied=True,
        head_dim=256,
        kv_heads=16,
        max_positions=8192,
    )
    hf_config.refuse_windows(config, parsed.num_hidden_layers)
    scale = parsed.hidden_size**0.5
    return replace(parsed, qkv_bias=bias, o_bias=bias, unit_offset=True, embedding_scale=scale)


def _activation(config: Mapping[str, Any]) -> Any:
    """The MLP's activation. Released configs say `gelu` and mean its tanh form, in which the models were trained."""
    named = {key: config[key] for key in ("hidden_act", "hidden_activation") if config.get(key) is not None}
    meant = {key: "gelu_pytorch_tanh" if value == "gelu" else value for key, value in named.items()}
    activation = meant.get("hidden_act", "gelu_pytorch_tanh")
    if meant.get("hidden_activation", activation) != activation:
        raise UserError(
            f"config.json: hidden_activation {named['hidden_activation']!r} and hidden_act "
            f"{named.get('hidden_act', activation)!r} differ: set both to the one that the model was trained with"
        )
    return activation


FAMILY = gated.family(
    "gemma",
    "GemmaForCausalLM",
    parse_config,
    bos_every_window=True,
)
