"""Granite 3: Llama with factors of embeddings, attention scores, residuals and logits."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neuroal_jax.models import gated, hf_config

_FACTORS = ("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier")


def parse_config(config: Mapping[str, Any]) -> gated.GatedConfig:
    """Reads config.json, refusing what is not implemented."""
    bias = hf_config.take_bool(config, "attention_bias", False)
    parsed = gated.parse(config, ("attention_bias", "mlp_bias", *_FACTORS))
    hf_config.refuse_windows(config, parsed.num_hidden_layers)
    attention, embedding, logits, residual = (hf_config.take_float(config, key, 1.0) for key in _FACTORS)
    return replace(
        parsed,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=hf_config.take_bool(config, "mlp_bias", False),
        scale=attention,
        embedding_scale=embedding,
        logits_scaling=logits,
        residual_multiplier=residual,
    )


FAMILY = gated.family("granite", "GraniteForCausalLM", parse_config)
