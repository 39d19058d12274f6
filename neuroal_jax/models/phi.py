"""Phi 1, 1.5 and 2: attention and MLP in parallel on one normed input, partial rotation, biases everywhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from neuroal_jax.errors import UserError
from neuroal_jax.models import hf_config, layers
from neuroal_jax.models.attention import causal_attention
from neuroal_jax.models.family import Family, LinearSpec, ParamRule, linear_rules
from neuroal_jax.models.rope import ROPE_ATTRIBUTES, Rope, rotate_part, take_partial_rope

# Attention and MLP read the same input, so what `dense` feeds is, like what fc2 feeds, the next block's input.
LINEARS = (
    LinearSpec("self_attn.q_proj", reads="block_input", feeds="attention_output", selects=True),
    LinearSpec("self_attn.k_proj", reads="block_input", feeds="attention_output", grouped=True, selects=True),
    LinearSpec("self_attn.v_proj", reads="block_input", feeds="attention_output", grouped=True),
    LinearSpec("self_attn.dense", reads="attention_output", feeds="block_input", feeds_next_block=True),
    LinearSpec("mlp.fc1", reads="block_input", feeds="mlp_hidden", in_mlp=True),
    LinearSpec("mlp.fc2", reads="mlp_hidden", feeds="block_input", feeds_next_block=True, in_mlp=True),
)
_BLOCK = "model.layers.{block}."
# Attributes of config.json that are read, or that only training reads; all others are refused.
_ATTRIBUTES = ROPE_ATTRIBUTES | frozenset(
    """
    embd_pdrop head_dim hidden_act hidden_size intermediate_size layer_norm_eps max_position_embeddings
    layer_types num_attention_heads num_hidden_layers num_key_value_heads qk_layernorm resid_pdrop tie_word_embeddings
    vocab_size
    """.split()
)


@dataclass(frozen=True)
class PhiConfig:
    """What the forward pass needs of config.json, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    layer_norm_eps: float
    rope: Rope
    hidden_act: str
    qk_layernorm: bool
    tie_word_embeddings: bool


def parse_config(config: Mapping[str, Any]) -> PhiConfig:
    """Reads config.json, refusing what is not implemented."""
    hf_config.check_attributes(config, _ATTRIBUTES)
    hidden, heads = hf_config.take_int(config, "hidden_size"), hf_config.take_int(config, "num_attention_heads")
    kv_heads = hf_config.take_int(config, "num_key_value_heads", heads)
    if hidden % heads or heads % kv_heads:
        raise UserError(
            f"config.json: hidden_size {hidden}, num_attention_heads {heads} and num_key_value_heads {kv_heads} "
            "must each be a multiple of the next"
        )
    head_dim = hf_config.take_int(config, "head_dim", hidden // heads)
    blocks = hf_config.take_int(config, "num_hidden_layers", high=hf_config.MAX_BLOCKS)
    hf_config.refuse_windows(config, blocks)
    max_positions = hf_config.take_int(config, "max_position_embeddings", 2048)
    rope = take_partial_rope(config, head_dim, max_positions, 0.5)
    if head_dim != hidden // heads or (rope.rotated or 0) % 2:
        raise UserError(
            f"config.json: {rope.rotated} of {head_dim} dimensions of a head are rotated, expected an even part of "
            f"{hidden // heads}"
        )
    return PhiConfig(
        vocab_size=hf_config.take_int(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=hf_config.take_int(config, "intermediate_size"),
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        layer_norm_eps=hf_config.take_float(config, "layer_norm_eps", 1e-5),
        rope=rope,
        hidden_act=hf_config.take_choice(config, "hidden_act", layers.ACTIVATIONS, "gelu_new"),
        qk_layernorm=hf_config.take_bool(config, "qk_layernorm", False),
        tie_word_embeddings=hf_config.take_bool(config, "tie_word_embeddings", False),
    )


class Attention(nnx.Module):
    """Grouped-query attention that rotates the first dimensions of each head."""

    def __init__(self, config: PhiConfig, *, rngs: nnx.Rngs) -> None:
        size, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.config = config
        self.q_proj = layers.linear(size, size, bias=True, rngs=rngs)
        self.k_proj = layers.linear(size, keys, bias=True, rngs=rngs)
        self.v_proj = layers.linear(size, keys, bias=True, rngs=rngs)
        self.dense = layers.linear(size, size, bias=True, rngs=rngs)
        if config.qk_layernorm:
            self.q_layernorm = layers.LayerNorm(config.head_dim, config.layer_norm_eps)
            self.k_layernorm = layers.LayerNorm(config.head_dim, config.layer_norm_eps)

    def mix(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Everything up to dense's input."""
        config = self.config
        split = (*x.shape[:2], -1, config.head_dim)
        q, k, v = self.q_proj(x).reshape(split), self.k_proj(x).reshape(split), self.v_proj(x).reshape(split)
        if config.qk_layernorm:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        q, k = rotate_part(q, config.rope), rotate_part(k, config.rope)
        return causal_attention(q, k, v, scale=config.head_dim**-0.5).reshape(x.shape)


class MLP(nnx.Module):
    """Two linears and an activation."""

    def __init__(self, config: PhiConfig, *, rngs: nnx.Rngs) -> None:
        self.fc1 = layers.linear(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)
        self.fc2 = layers.linear(config.intermediate_size, config.hidden_size, bias=True, rngs=rngs)


class PhiBlock(nnx.Module):
    """One decoder block."""

    def __init__(self, config: PhiConfig, *, rngs: nnx.Rngs) -> None:
        self.activation = config.hidden_act
        self.input_layernorm = layers.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, hidden: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """Returns the block's output and the inputs of its linears, by the names in `LINEARS`."""
        block_input = self.input_layernorm(hidden)
        attention_output = self.self_attn.mix(block_input)
        mlp_hidden = layers.ACTIVATIONS[self.activation](self.mlp.fc1(block_input))
        hidden = self.self_attn.dense(attention_output) + self.mlp.fc2(mlp_hidden) + hidden
        inputs = {"block_input": block_input, "attention_output": attention_output, "mlp_hidden": mlp_hidden}
        return hidden, inputs


def head(config: PhiConfig, rngs: nnx.Rngs) -> layers.NormHead:
    """Hidden states to logits."""
    norm = layers.LayerNorm(config.hidden_size, config.layer_norm_eps)
    return layers.NormHead(norm, config.vocab_size, config.hidden_size, bias=True, rngs=rngs)


def rules(config: PhiConfig) -> tuple[ParamRule, ...]:
    """The table of all tensors."""
    embeddings, tied = "model.embed_tokens.weight", config.tie_word_embeddings
    norms = [(f"{_BLOCK}input_layernorm", "blocks.{block}.input_layernorm"), ("model.final_layernorm", "head.norm")]
    if config.qk_layernorm:
        names = ("self_attn.q_layernorm", "self_attn.k_layernorm")
        norms += [(f"{_BLOCK}{name}", f"blocks.{{block}}.{name}") for name in names]
    return (
        ParamRule(embeddings, "stem.embedding"),
        *(ParamRule(f"{hf}.weight", f"{flax}.scale") for hf, flax in norms),
        *(ParamRule(f"{hf}.bias", f"{flax}.bias") for hf, flax in norms),
        *linear_rules(_BLOCK, [linear.name for linear in LINEARS], bias=True),
        ParamRule(embeddings if tied else "lm_head.weight", "head.embedding", tied=tied),
        ParamRule("lm_head.bias", "head.bias"),
    )


FAMILY = Family(
    name="phi",
    architectures=("PhiForCausalLM",),
    parse_config=parse_config,
    linears=LINEARS,
    rules=rules,
    stem=lambda config, rngs: layers.Embedding(config.vocab_size, config.hidden_size, rngs=rngs),
    block=lambda config, rngs: PhiBlock(config, rngs=rngs),
    head=head,
)
