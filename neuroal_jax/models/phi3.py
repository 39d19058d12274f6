"""Phi-3, 3.5 and 4: Llama with q, k and v in one tensor, gate and up in another, and rotations for long contexts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from neuroal_jax.errors import UserError
from neuroal_jax.models import gated, hf_config, layers
from neuroal_jax.models.attention import causal_attention
from neuroal_jax.models.family import GATE_UP, QKV, LinearSpec, ParamRule, linear_rules
from neuroal_jax.models.rope import ROPE_ATTRIBUTES, Rope, rope_values, rotate_part, take_partial_rope

LINEARS = (
    LinearSpec("self_attn.o_proj", reads="attention_output", feeds="mlp_input"),
    LinearSpec("self_attn.qkv_proj", reads="attention_input", fused=QKV),
    LinearSpec("mlp.gate_up_proj", reads="mlp_input", fused=GATE_UP, in_mlp=True),
    LinearSpec("mlp.down_proj", reads="mlp_hidden", feeds="attention_input", feeds_next_block=True, in_mlp=True),
)
_CONTEXT = "original_max_position_embeddings"


def parse_config(config: Mapping[str, Any]) -> gated.GatedConfig:
    """Reads config.json, refusing what is not implemented."""
    unrotated = {"rms_norm_eps": 1e-5} | {key: value for key, value in config.items() if key not in ROPE_ATTRIBUTES}
    parsed = gated.parse(unrotated, ("embd_pdrop", "resid_pdrop", "sliding_window"), max_positions=4096)
    blocks, window = parsed.num_hidden_layers, hf_config.take_window(config, None)
    windows = (window is not None,) * blocks
    if hf_config.take_windowed_layers(config, blocks) not in (None, windows):
        raise UserError(f"config.json: layer_types and sliding_window {window} disagree: Phi-3 has one kind of block")
    return replace(gated.windowed(parsed, window, windows), rope=_rope(config, parsed))


def _rope(config: Mapping[str, Any], parsed: gated.GatedConfig) -> Rope:
    """The rotation: default or `longrope`, which Phi-3's older files call `su` (and would call `yarn`).

    Its original context is the attribute beside it, never one inside.
    """
    usual = {**config, _CONTEXT: hf_config.take_int(config, _CONTEXT, 4096)}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), Mapping):
            usual[key] = {
                name: "longrope" if name in ("type", "rope_type") and value in ("su", "yarn") else value
                for name, value in config[key].items()
            }
    kind = rope_values(usual)["rope_type"]
    if kind not in ("default", "longrope"):
        raise UserError(f"config.json: rope scaling type {kind!r} is not supported, expected default, longrope")
    return take_partial_rope(usual, parsed.head_dim, parsed.max_position_embeddings, 1.0)


class Attention(gated.Attention):
    """Grouped-query attention whose queries, keys and values come out of one linear, one after the other."""

    def __init__(self, config: gated.GatedConfig, *, rngs: nnx.Rngs) -> None:
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.config = config
        self.o_proj = layers.linear(queries, config.hidden_size, bias=False, rngs=rngs)
        self.qkv_proj = layers.linear(config.hidden_size, queries + 2 * keys, bias=False, rngs=rngs)

    def mix(self, x: Float[Array, "b t d"]) -> Float[Array, "b t q"]:
        """Everything up to o_proj's input."""
        config = self.config
        heads = self.qkv_proj(x).reshape(*x.shape[:2], -1, config.head_dim)
        first, second = config.num_attention_heads, config.num_attention_heads + config.num_key_value_heads
        q, k, v = jnp.split(heads, (first, second), axis=2)
        q, k = rotate_part(q, config.rope), rotate_part(k, config.rope)
        return causal_attention(q, k, v, scale=config.scale, window=config.sliding_window).reshape(*x.shape[:2], -1)


class MLP(gated.MLP):
    """Gated MLP whose gate and up come out of one linear."""

    def __init__(self, config: gated.GatedConfig, *, rngs: nnx.Rngs) -> None:
        self.activation = config.hidden_act
        self.gate_up_proj = layers.linear(config.hidden_size, 2 * config.intermediate_size, bias=False, rngs=rngs)
        self.down_proj = layers.linear(config.intermediate_size, config.hidden_size, bias=False, rngs=rngs)

    def gate(self, x: Float[Array, "b t d"]) -> Float[Array, "b t i"]:
        """Everything up to down_proj's input."""
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return layers.ACTIVATIONS[self.activation](gate) * up


class Phi3Block(gated.GatedBlock):
    """One decoder block."""

    attention_class = Attention
    mlp_class = MLP


def rules(config: gated.GatedConfig) -> tuple[ParamRule, ...]:
    """The table of all tensors."""
    shared = [rule for rule in gated.rules(config) if not rule.transpose]
    return (*shared, *linear_rules(gated.HF_BLOCK, [linear.name for linear in LINEARS], bias=False))


FAMILY = gated.family(
    "phi3",
    "Phi3ForCausalLM",
    parse_config,
    linears=LINEARS,
    rules=rules,
    block=lambda config, rngs: Phi3Block(config, rngs=rngs),
)
