"""OPT: learned positions, biases, norms before (or, as in 350m, after) attention and MLP, a tied head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from neuroal_jax.errors import UserError
from neuroal_jax.models import hf_config, layers
from neuroal_jax.models.attention import causal_attention
from neuroal_jax.models.family import Family, LinearSpec, ParamRule, linear_rules

LINEARS = (
    LinearSpec("self_attn.k_proj", reads="attention_input", feeds="attention_output", selects=True),
    LinearSpec("self_attn.v_proj", reads="attention_input", feeds="attention_output"),
    LinearSpec("self_attn.q_proj", reads="attention_input", feeds="attention_output", selects=True),
    LinearSpec("self_attn.out_proj", reads="attention_output", feeds="mlp_input"),
    LinearSpec("fc1", reads="mlp_input", feeds="mlp_hidden", in_mlp=True),
    LinearSpec("fc2", reads="mlp_hidden", feeds="attention_input", feeds_next_block=True, in_mlp=True),
)
_OFFSET = 2  # the first rows of the position table are never used
_EPSILON = 1e-5
_HF = "model.decoder."
_BLOCK = _HF + "layers.{block}."
# Attributes of config.json that are read, or that only training reads; all others are refused.
_ATTRIBUTES = frozenset(
    """
    _remove_final_layer_norm activation_function do_layer_norm_before dropout enable_bias ffn_dim hidden_size init_std
    layer_norm_elementwise_affine layer_types layerdrop max_position_embeddings num_attention_heads num_hidden_layers
    tie_word_embeddings vocab_size word_embed_proj_dim
    """.split()
)


@dataclass(frozen=True)
class OPTConfig:
    """What the forward pass needs of config.json, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    ffn_dim: int
    word_embed_proj_dim: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    activation_function: str
    do_layer_norm_before: bool
    enable_bias: bool
    layer_norm_elementwise_affine: bool
    final_layer_norm: bool
    tie_word_embeddings: bool

    @property
    def projected(self) -> bool:
        """Whether embeddings have another width than hidden states."""
        return self.word_embed_proj_dim != self.hidden_size


def parse_config(config: Mapping[str, Any]) -> OPTConfig:
    """Reads config.json, refusing what is not implemented."""
    hf_config.check_attributes(config, _ATTRIBUTES)
    hidden, heads = hf_config.take_int(config, "hidden_size"), hf_config.take_int(config, "num_attention_heads")
    if hidden % heads:
        raise UserError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    before = hf_config.take_bool(config, "do_layer_norm_before", True)
    blocks = hf_config.take_int(config, "num_hidden_layers", high=hf_config.MAX_BLOCKS)
    hf_config.refuse_windows(config, blocks)
    return OPTConfig(
        vocab_size=hf_config.take_int(config, "vocab_size"),
        hidden_size=hidden,
        ffn_dim=hf_config.take_int(config, "ffn_dim"),
        word_embed_proj_dim=hf_config.take_int(config, "word_embed_proj_dim", hidden),
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=hf_config.take_int(config, "max_position_embeddings", 2048),
        activation_function=hf_config.take_choice(config, "activation_function", layers.ACTIVATIONS, "relu"),
        do_layer_norm_before=before,
        enable_bias=hf_config.take_bool(config, "enable_bias", True),
        layer_norm_elementwise_affine=hf_config.take_bool(config, "layer_norm_elementwise_affine", True),
        final_layer_norm=before and not hf_config.take_bool(config, "_remove_final_layer_norm", False),
        tie_word_embeddings=hf_config.take_bool(config, "tie_word_embeddings", True),
    )


def _norm(config: OPTConfig) -> layers.LayerNorm:
    return layers.LayerNorm(config.hidden_size, _EPSILON, affine=config.layer_norm_elementwise_affine)


class OPTStem(nnx.Module):
    """Token embeddings, projected to the hidden width if they have another, plus learned positions."""

    def __init__(self, config: OPTConfig, *, rngs: nnx.Rngs) -> None:
        self.embedding = layers.embedding(config.vocab_size, config.word_embed_proj_dim, rngs)
        self.positions = layers.embedding(config.max_position_embeddings + _OFFSET, config.hidden_size, rngs)
        if config.projected:
            self.project_in = layers.linear(config.word_embed_proj_dim, config.hidden_size, bias=False, rngs=rngs)

    def __call__(self, tokens: Integer[Array, "b t"]) -> Float[Array, "b t d"]:
        """Tokens to hidden states."""
        hidden = self.embedding[...][tokens]
        if hasattr(self, "project_in"):
            hidden = self.project_in(hidden)
        return hidden + self.positions[...][_OFFSET : _OFFSET + tokens.shape[1]]


class Attention(nnx.Module):
    """Multi-head attention with biases, without rotation."""

    def __init__(self, config: OPTConfig, *, rngs: nnx.Rngs) -> None:
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.k_proj = layers.linear(size, size, bias=config.enable_bias, rngs=rngs)
        self.v_proj = layers.linear(size, size, bias=config.enable_bias, rngs=rngs)
        self.q_proj = layers.linear(size, size, bias=config.enable_bias, rngs=rngs)
        self.out_proj = layers.linear(size, size, bias=config.enable_bias, rngs=rngs)

    def mix(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Everything up to out_proj's input."""
        q, k, v = (proj(x).reshape(*x.shape[:2], self.heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return causal_attention(q, k, v, scale=q.shape[-1] ** -0.5).reshape(x.shape)


class OPTBlock(nnx.Module):
    """One decoder block."""

    def __init__(self, config: OPTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.self_attn = Attention(config, rngs=rngs)
        self.self_attn_layer_norm = _norm(config)
        self.fc1 = layers.linear(config.hidden_size, config.ffn_dim, bias=config.enable_bias, rngs=rngs)
        self.fc2 = layers.linear(config.ffn_dim, config.hidden_size, bias=config.enable_bias, rngs=rngs)
        self.final_layer_norm = _norm(config)

    def __call__(self, hidden: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """Returns the block's output and the inputs of its linears, by the names in `LINEARS`."""
        before = self.config.do_layer_norm_before
        attention_input = self.self_attn_layer_norm(hidden) if before else hidden
        attention_output = self.self_attn.mix(attention_input)
        hidden = hidden + self.self_attn.out_proj(attention_output)
        hidden = hidden if before else self.self_attn_layer_norm(hidden)
        mlp_input = self.final_layer_norm(hidden) if before else hidden
        mlp_hidden = layers.ACTIVATIONS[self.config.activation_function](self.fc1(mlp_input))
        hidden = hidden + self.fc2(mlp_hidden)
        hidden = hidden if before else self.final_layer_norm(hidden)
        inputs = {
            "attention_input": attention_input,
            "attention_output": attention_output,
            "mlp_input": mlp_input,
            "mlp_hidden": mlp_hidden,
        }
        return hidden, inputs


class OPTHead(nnx.Module):
    """The final norm, if there is one, the projection to the embeddings' width, if there is one, and the vocabulary."""

    def __init__(self, config: OPTConfig, *, rngs: nnx.Rngs) -> None:
        if config.final_layer_norm:
            self.norm = _norm(config)
        if config.projected:
            self.project_out = layers.linear(config.hidden_size, config.word_embed_proj_dim, bias=False, rngs=rngs)
        self.embedding = layers.embedding(config.vocab_size, config.word_embed_proj_dim, rngs)

    def __call__(self, hidden: Float[Array, "*b t d"]) -> Float[Array, "*b t v"]:
        """Logits."""
        return self.logits(self.features(hidden))

    def features(self, hidden: Float[Array, "*b t d"]) -> Float[Array, "*b t f"]:
        """What the vectors of all tokens are multiplied with."""
        for part in ("norm", "project_out"):
            if hasattr(self, part):
                hidden = getattr(self, part)(hidden)
        return hidden

    def slopes(self) -> Float[Array, "v f"]:
        """By what each feature changes each logit."""
        return self.embedding[...].astype(jnp.float32)

    def logits(self, features: Float[Array, "*b t f"]) -> Float[Array, "*b t v"]:
        """Logits of features."""
        return jnp.einsum("...d,vd->...v", features, self.embedding[...], precision=jax.lax.Precision.HIGHEST)


def rules(config: OPTConfig) -> tuple[ParamRule, ...]:
    """The table of all tensors."""
    embeddings, tied = f"{_HF}embed_tokens.weight", config.tie_word_embeddings
    found = [
        ParamRule(embeddings, "stem.embedding"),
        ParamRule(f"{_HF}embed_positions.weight", "stem.positions"),
        *linear_rules(_BLOCK, [linear.name for linear in LINEARS], bias=config.enable_bias),
        ParamRule(embeddings if tied else "lm_head.weight", "head.embedding", tied=tied),
    ]
    norms = [(f"{_BLOCK}{name}", f"blocks.{{block}}.{name}") for name in ("self_attn_layer_norm", "final_layer_norm")]
    if config.final_layer_norm:
        norms.append((f"{_HF}final_layer_norm", "head.norm"))
    if config.layer_norm_elementwise_affine:
        found += [ParamRule(f"{hf}.weight", f"{flax}.scale") for hf, flax in norms]
        found += [ParamRule(f"{hf}.bias", f"{flax}.bias") for hf, flax in norms]
    if config.projected:
        found.append(ParamRule(f"{_HF}project_in.weight", "stem.project_in.kernel", transpose=True))
        found.append(ParamRule(f"{_HF}project_out.weight", "head.project_out.kernel", transpose=True))
    return tuple(found)


FAMILY = Family(
    name="opt",
    architectures=("OPTForCausalLM",),
    parse_config=parse_config,
    linears=LINEARS,
    rules=rules,
    stem=lambda config, rngs: OPTStem(config, rngs=rngs),
    block=lambda config, rngs: OPTBlock(config, rngs=rngs),
    head=lambda config, rngs: OPTHead(config, rngs=rngs),
)
