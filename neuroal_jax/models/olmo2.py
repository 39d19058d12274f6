"""OLMo 2: Llama with norms after attention and MLP instead of before them, and normalised queries and keys."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neuroal_jax.models import gated, hf_config


def parse_config(config: Mapping[str, Any]) -> gated.GatedConfig:
    """Reads config.json, refusing what is not implemented."""
    bias = hf_config.take_bool(config, "attention_bias", False)
    parsed = gated.parse({"rms_norm_eps": 1e-5, **config}, ("attention_bias",))
    hf_config.refuse_windows(config, parsed.num_hidden_layers)
    return replace(
        parsed,
        qkv_bias=bias,
        o_bias=bias,
        wide=True,
        qk_norm="projection",
        norms=(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    )


FAMILY = gated.family("olmo2", "Olmo2ForCausalLM", parse_config)
