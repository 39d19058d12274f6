"""Llama 1, 2 and 3: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from neuroal_jax.errors import UserError
from neuroal_jax.models import hf_config, layers
from neuroal_jax.models.family import Family, LinearSpec, ParamRule, linear_rules

# In named_modules order. D - S of the last linear's target, the next block's first input, is always zero.
LINEARS = (
    LinearSpec("self_attn.q_proj", reads="attention_input", feeds="attention_output"),
    LinearSpec("self_attn.k_proj", reads="attention_input", feeds="attention_output", grouped=True),
    LinearSpec("self_attn.v_proj", reads="attention_input", feeds="attention_output", grouped=True),
    LinearSpec("self_attn.o_proj", reads="attention_output", feeds="mlp_input"),
    LinearSpec("mlp.gate_proj", reads="mlp_input", feeds="mlp_hidden"),
    LinearSpec("mlp.up_proj", reads="mlp_input", feeds="mlp_hidden"),
    LinearSpec("mlp.down_proj", reads="mlp_hidden", feeds="attention_input", feeds_next_block=True),
)


@dataclass(frozen=True)
class LlamaConfig:
    """What the forward pass needs of config.json, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: hf_config.Rope
    hidden_act: str
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool


def parse_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Reads config.json, refusing what the modules below do not implement."""
    known = {*LlamaConfig.__dataclass_fields__, "rope_theta", "rope_scaling", "rope_parameters"}
    hf_config.refuse_unknown(config, frozenset(known))
    hidden_size = hf_config.take_int(config, "hidden_size")
    heads = hf_config.take_int(config, "num_attention_heads")
    kv_heads = hf_config.take_int(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if config.get("head_dim") is None and hidden_size % heads:
        raise UserError(f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
    head_dim = hf_config.take_int(config, "head_dim", hidden_size // heads, low=2)
    if head_dim % 2:
        raise UserError(f"config.json: head_dim {head_dim} is odd, rotary positions need an even one")
    activation = config.get("hidden_act", "silu")
    if activation not in layers.ACTIVATIONS:
        raise UserError(
            f"config.json: hidden_act {activation!r} is not supported, expected one of {sorted(layers.ACTIVATIONS)}"
        )
    return LlamaConfig(
        vocab_size=hf_config.take_int(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=hf_config.take_int(config, "intermediate_size"),
        num_hidden_layers=hf_config.take_int(config, "num_hidden_layers", high=hf_config.MAX_BLOCKS),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=hf_config.take_int(config, "max_position_embeddings", 2048),
        rms_norm_eps=hf_config.take_float(config, "rms_norm_eps", 1e-6),
        rope=hf_config.take_rope(config),
        hidden_act=activation,
        attention_bias=hf_config.take_bool(config, "attention_bias", False),
        mlp_bias=hf_config.take_bool(config, "mlp_bias", False),
        tie_word_embeddings=hf_config.take_bool(config, "tie_word_embeddings", False),
    )


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.config = config
        self.q_proj = layers.linear(config.hidden_size, queries, bias=bias, rngs=rngs)
        self.k_proj = layers.linear(config.hidden_size, keys, bias=bias, rngs=rngs)
        self.v_proj = layers.linear(config.hidden_size, keys, bias=bias, rngs=rngs)
        self.o_proj = layers.linear(queries, config.hidden_size, bias=bias, rngs=rngs)

    def mix(self, x: Float[Array, "b t d"]) -> Float[Array, "b t q"]:
        """Everything up to o_proj's input."""
        split = (*x.shape[:2], -1, self.config.head_dim)
        frequencies = layers.rope_frequencies(self.config.head_dim, self.config.rope)
        q = layers.rotate(self.q_proj(x).reshape(split), frequencies)
        k = layers.rotate(self.k_proj(x).reshape(split), frequencies)
        v = self.v_proj(x).reshape(split)
        return layers.causal_attention(q, k, v).reshape(*x.shape[:2], -1)


class MLP(nnx.Module):
    """Gated MLP: `down(act(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        inner, bias = config.intermediate_size, config.mlp_bias
        self.activation = config.hidden_act
        self.gate_proj = layers.linear(config.hidden_size, inner, bias=bias, rngs=rngs)
        self.up_proj = layers.linear(config.hidden_size, inner, bias=bias, rngs=rngs)
        self.down_proj = layers.linear(inner, config.hidden_size, bias=bias, rngs=rngs)

    def gate(self, x: Float[Array, "b t d"]) -> Float[Array, "b t i"]:
        """Everything up to down_proj's input."""
        return layers.ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)


class LlamaBlock(nnx.Module):
    """One decoder block."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, hidden: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """Returns the block's output and the inputs of its linears, by the names in `LINEARS`."""
        attention_input = self.input_layernorm(hidden)
        attention_output = self.self_attn.mix(attention_input)
        hidden = hidden + self.self_attn.o_proj(attention_output)
        mlp_input = self.post_attention_layernorm(hidden)
        mlp_hidden = self.mlp.gate(mlp_input)
        hidden = hidden + self.mlp.down_proj(mlp_hidden)
        inputs = {
            "attention_input": attention_input,
            "attention_output": attention_output,
            "mlp_input": mlp_input,
            "mlp_hidden": mlp_hidden,
        }
        return hidden, inputs


def stem(config: LlamaConfig, rngs: nnx.Rngs) -> layers.Embedding:
    """Tokens to hidden states."""
    return layers.Embedding(config.vocab_size, config.hidden_size, rngs=rngs)


def block(config: LlamaConfig, rngs: nnx.Rngs) -> LlamaBlock:
    """One decoder block."""
    return LlamaBlock(config, rngs=rngs)


def head(config: LlamaConfig, rngs: nnx.Rngs) -> layers.NormHead:
    """Hidden states to logits."""
    norm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)
    return layers.NormHead(norm, config.vocab_size, config.hidden_size, rngs=rngs)


def rules(config: LlamaConfig) -> tuple[ParamRule, ...]:
    """The table of all tensors."""
    prefix = "model.layers.{block}."
    attention = [linear.name for linear in LINEARS if linear.name.startswith("self_attn.")]
    mlp = [linear.name for linear in LINEARS if linear.name.startswith("mlp.")]
    embeddings = "model.embed_tokens.weight"
    tied = config.tie_word_embeddings
    return (
        ParamRule(embeddings, "stem.embedding"),
        ParamRule(f"{prefix}input_layernorm.weight", "blocks.{block}.input_layernorm.scale"),
        ParamRule(f"{prefix}post_attention_layernorm.weight", "blocks.{block}.post_attention_layernorm.scale"),
        *linear_rules(prefix, attention, bias=config.attention_bias),
        *linear_rules(prefix, mlp, bias=config.mlp_bias),
        ParamRule("model.norm.weight", "head.norm.scale"),
        ParamRule(embeddings if tied else "lm_head.weight", "head.embedding", tied=tied),
    )


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    parse_config=parse_config,
    linears=LINEARS,
    rules=rules,
    stem=stem,
    block=block,
    head=head,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
