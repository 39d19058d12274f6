"""Gemma 2: Gemma with softcaps, norms after attention and MLP too, and a sliding window in every other block."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from neuroal_jax.models import gated, hf_config
from neuroal_jax.models.family import ParamRule

_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
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
        embedding_scale=parsed.hidden_size**0.5,
        scale=hf_config.take_float(config, "query_pre_attn_scalar", 256) ** -0.5,
        softcap=hf_config.take_optional_float(config, "attn_logit_softcapping", 50.0),
        logit_softcap=hf_config.take_optional_float(config, "final_logit_softcapping", 30.0),
    )


class Gemma2Block(nnx.Module):
    """One decoder block."""

    def __init__(self, config: gated.GatedConfig, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = gated.norm(config)
        self.self_attn = gated.Attention(config, rngs=rngs)
        self.post_attention_layernorm = gated.norm(config)
        self.pre_feedforward_layernorm = gated.norm(config)
        self.mlp = gated.MLP(config, rngs=rngs)
        self.post_feedforward_layernorm = gated.norm(config)

    def __call__(self, hidden: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """Returns the block's output and the inputs of its linears, by the names in `gated.LINEARS`."""
        attention_input = self.input_layernorm(hidden)
        attention_output = self.self_attn.mix(attention_input)
        hidden = hidden + self.post_attention_layernorm(self.self_attn.o_proj(attention_output))
        mlp_input = self.pre_feedforward_layernorm(hidden)
        mlp_hidden = self.mlp.gate(mlp_input)
        hidden = hidden + self.post_feedforward_layernorm(self.mlp.down_proj(mlp_hidden))
        inputs = {
            "attention_input": attention_input,
            "attention_output": attention_output,
            "mlp_input": mlp_input,
            "mlp_hidden": mlp_hidden,
        }
        return hidden, inputs


def block(config: gated.GatedConfig, rngs: nnx.Rngs) -> Gemma2Block:
    """One decoder block."""
    return Gemma2Block(config, rngs=rngs)


def rules(config: gated.GatedConfig) -> tuple[ParamRule, ...]:
    """The table of all tensors."""
    return gated.rules(config, _NORMS)


FAMILY = gated.family(
    "gemma2",
    "Gemma2ForCausalLM",
    parse_config,
    rules=rules,
    block=block,
    bos_every_window=True,
)
