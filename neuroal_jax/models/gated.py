"""What Llama and its relatives share: rotary grouped-query attention, a gated MLP, norms before both.

A family file sets the config's switches; where its block differs it writes its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from neuroal_jax.errors import UserError
from neuroal_jax.models import hf_config, layers
from neuroal_jax.models.attention import causal_attention
from neuroal_jax.models.family import Family, LinearSpec, ParamRule, linear_rules
from neuroal_jax.models.rope import ROPE_ATTRIBUTES, Rope, rope_values, rotate, take_rope

# In named_modules order. D - S of the last linear's target, the next block's first input, is always zero.
LINEARS = (
    LinearSpec("self_attn.q_proj", reads="attention_input", feeds="attention_output", selects=True),
    LinearSpec("self_attn.k_proj", reads="attention_input", feeds="attention_output", grouped=True, selects=True),
    LinearSpec("self_attn.v_proj", reads="attention_input", feeds="attention_output", grouped=True),
    LinearSpec("self_attn.o_proj", reads="attention_output", feeds="mlp_input"),
    LinearSpec("mlp.gate_proj", reads="mlp_input", feeds="mlp_hidden", selects=True, in_mlp=True),
    LinearSpec("mlp.up_proj", reads="mlp_input", feeds="mlp_hidden", in_mlp=True),
    LinearSpec("mlp.down_proj", reads="mlp_hidden", feeds="attention_input", feeds_next_block=True, in_mlp=True),
)
HF_BLOCK = "model.layers.{block}."


@dataclass(frozen=True)
class GatedConfig:
    """What the forward pass needs of config.json, under Hugging Face's names where it has one.

    Attributes:
        qkv_bias: Whether q, k and v have biases; `o_bias` and `mlp_bias` likewise.
        qk_norm: What is normalised of queries and keys before the rotation: each `head`, the whole `projection`, None.
        scale: Factor of the attention scores.
        softcap: Bound that the attention scores approach, or None.
        sliding_window: How many positions a token sees, itself included, or None; by block if `layer_windows`.
        unit_offset: Whether norms scale by `1 + weight`.
        wide: Whether norms and rotations round only what they give, not what they multiply.
        embedding_scale: Factor of the embeddings.
        residual_multiplier: Factor of what attention and MLP add to the hidden states.
        logits_scaling: Divisor of the logits.
        logit_softcap: Bound that the logits approach, or None.
        norms: Names of the norms before attention, after it, before the MLP and after it; None where there is none.
        layer_windows: Whether a block sees the sliding window, per block; empty where all blocks are alike.
        other_ropes: The rotations of blocks that do not have `rope`; None is none.
        layer_ropes: The number of a block's rotation, per block, among `rope` and `other_ropes`; empty where all have
            `rope`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    hidden_act: str
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    scale: float = 1.0
    softcap: float | None = None
    sliding_window: int | None = None
    unit_offset: bool = False
    wide: bool = False
    embedding_scale: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    logit_softcap: float | None = None
    norms: tuple[str | None, ...] = ("input_layernorm", None, "post_attention_layernorm", None)
    layer_windows: tuple[bool, ...] = ()
    other_ropes: tuple[Rope | None, ...] = ()
    layer_ropes: tuple[int, ...] = ()


# Attributes of config.json that `parse` reads. Families add their own; all others are refused.
_ATTRIBUTES = ROPE_ATTRIBUTES | frozenset(
    """
    head_dim hidden_act hidden_size intermediate_size layer_types max_position_embeddings num_attention_heads
    num_hidden_layers num_key_value_heads rms_norm_eps tie_word_embeddings vocab_size
    """.split()
)


def parse(
    config: Mapping[str, Any],
    extra: tuple[str, ...] = (),
    *,
    activation: str = "silu",
    activation_key: str = "hidden_act",
    tied: bool = False,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    max_positions: int = 2048,
    theta: float = 10000.0,
) -> GatedConfig:
    """Reads what all these families have in common, refusing what may count and is neither common nor in `extra`.

    Absence means what it means to transformers: the default of its config class.

    Args:
        config: config.json.
        extra: Attributes that the family itself reads.
        activation: The MLP's activation where the config names none.
        activation_key: The attribute that names it.
        tied: Whether embeddings and head are tied where the config does not say.
        head_dim: Size of a head where the config does not say; None: hidden size over heads.
        kv_heads: Number of key/value heads where the config does not say; null, or None here: as many as heads.
        max_positions: Positions where the config does not say.
        theta: Base of the rotation where the config does not say.
    """
    hf_config.check_attributes(config, _ATTRIBUTES | {*extra, activation_key})
    hidden_size = hf_config.take_int(config, "hidden_size")
    heads = hf_config.take_int(config, "num_attention_heads")
    absent = "num_key_value_heads" not in config
    kv_heads = hf_config.take_int(config, "num_key_value_heads", kv_heads if kv_heads and absent else heads)
    if heads % kv_heads:
        raise UserError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if config.get("head_dim") is None and head_dim is None and hidden_size % heads:
        raise UserError(f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
    head_dim = hf_config.take_int(config, "head_dim", head_dim or hidden_size // heads, low=2)
    if head_dim % 2:
        raise UserError(f"config.json: head_dim {head_dim} is odd, rotary positions need an even one")
    max_positions = hf_config.take_int(config, "max_position_embeddings", max_positions)
    rope = take_rope(config, head_dim, max_positions, theta)
    if rope.kind != "default" and rope_values(config).get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor is not supported for this model_type")
    return GatedConfig(
        vocab_size=hf_config.take_int(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=hf_config.take_int(config, "intermediate_size"),
        num_hidden_layers=hf_config.take_int(config, "num_hidden_layers", high=hf_config.MAX_BLOCKS),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=hf_config.take_float(config, "rms_norm_eps", 1e-6),
        rope=rope,
        hidden_act=hf_config.take_choice(config, activation_key, layers.ACTIVATIONS, activation),
        tie_word_embeddings=hf_config.take_bool(config, "tie_word_embeddings", tied),
        scale=head_dim**-0.5,
    )


def windowed(config: GatedConfig, window: int | None, blocks: tuple[bool, ...]) -> GatedConfig:
    """A config with a sliding window in some blocks, in all, or in none.

    Args:
        config: One without windows.
        window: How many positions a token sees, itself included.
        blocks: Which blocks have the window.
    """
    if not any(blocks):
        return config
    if window is None:
        raise UserError("config.json: layer_types has sliding_attention, but no sliding_window is set")
    return replace(config, sliding_window=window, layer_windows=() if all(blocks) else blocks)


def block_constants(config: GatedConfig, block: int) -> dict[str, np.ndarray]:
    """In what blocks differ: how far block `block` looks back (the sliding window, or everything), and its rotation."""
    constants = {}
    if config.layer_windows:
        window = config.sliding_window if config.layer_windows[block] else 2**30
        constants["self_attn.window"] = np.asarray(window, np.int32)
    if config.layer_ropes:
        constants["self_attn.rope"] = np.asarray(config.layer_ropes[block], np.int32)
    return constants


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: GatedConfig, *, rngs: nnx.Rngs) -> None:
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.config = config
        self.q_proj = layers.linear(config.hidden_size, queries, bias=config.qkv_bias, rngs=rngs)
        self.k_proj = layers.linear(config.hidden_size, keys, bias=config.qkv_bias, rngs=rngs)
        self.v_proj = layers.linear(config.hidden_size, keys, bias=config.qkv_bias, rngs=rngs)
        self.o_proj = layers.linear(queries, config.hidden_size, bias=config.o_bias, rngs=rngs)
        if config.qk_norm:
            sizes = (queries, keys) if config.qk_norm == "projection" else (config.head_dim, config.head_dim)
            self.q_norm, self.k_norm = (norm(config, size) for size in sizes)
        if config.layer_windows:
            self.window = nnx.Variable(jnp.zeros((), jnp.int32))  # set per block, see `block_constants`
        if config.layer_ropes:
            self.rope = nnx.Variable(jnp.zeros((), jnp.int32))  # likewise

    def mix(self, x: Float[Array, "b t d"]) -> Float[Array, "b t q"]:
        """Everything up to o_proj's input."""
        config = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if config.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (heads.reshape(*x.shape[:2], -1, config.head_dim) for heads in (q, k, v))
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        which = self.rope[...] if config.layer_ropes else 0
        q, k = (rotate(x, config.rope, *config.other_ropes, which=which, wide=config.wide) for x in (q, k))
        window = self.window[...] if config.layer_windows else config.sliding_window
        out = causal_attention(q, k, v, scale=config.scale, softcap=config.softcap, window=window)
        return out.reshape(*x.shape[:2], -1)


class MLP(nnx.Module):
    """Gated MLP: `down(act(gate(x)) * up(x))`."""

    def __init__(self, config: GatedConfig, *, rngs: nnx.Rngs) -> None:
        inner, bias = config.intermediate_size, config.mlp_bias
        self.activation = config.hidden_act
        self.gate_proj = layers.linear(config.hidden_size, inner, bias=bias, rngs=rngs)
        self.up_proj = layers.linear(config.hidden_size, inner, bias=bias, rngs=rngs)
        self.down_proj = layers.linear(inner, config.hidden_size, bias=bias, rngs=rngs)

    def gate(self, x: Float[Array, "b t d"]) -> Float[Array, "b t i"]:
        """Everything up to down_proj's input."""
        return layers.ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)


def norm(config: GatedConfig, size: int | None = None) -> layers.RMSNorm:
    """A norm of hidden states, or of vectors of another size."""
    size = size or config.hidden_size
    return layers.RMSNorm(size, config.rms_norm_eps, unit_offset=config.unit_offset, wide=config.wide)


class GatedBlock(nnx.Module):
    """One decoder block.

    Attributes:
        attention_class: What it builds its attention of; `mlp_class` likewise. Families with other linears have theirs.
    """

    attention_class: ClassVar[type[Attention]] = Attention
    mlp_class: ClassVar[type[MLP]] = MLP

    def __init__(self, config: GatedConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.self_attn = self.attention_class(config, rngs=rngs)
        self.mlp = self.mlp_class(config, rngs=rngs)
        for name in filter(None, config.norms):
            setattr(self, name, norm(config))

    def __call__(self, hidden: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """Returns the block's output and the inputs of its linears, by the names in `LINEARS`."""
        before_attention, after_attention, before_mlp, after_mlp = self.config.norms
        attention_input = self._normed(before_attention, hidden)
        attention_output = self.self_attn.mix(attention_input)
        hidden = hidden + self._scaled(self._normed(after_attention, self.self_attn.o_proj(attention_output)))
        mlp_input = self._normed(before_mlp, hidden)
        mlp_hidden = self.mlp.gate(mlp_input)
        hidden = hidden + self._scaled(self._normed(after_mlp, self.mlp.down_proj(mlp_hidden)))
        inputs = {
            "attention_input": attention_input,
            "attention_output": attention_output,
            "mlp_input": mlp_input,
            "mlp_hidden": mlp_hidden,
        }
        return hidden, inputs

    def _normed(self, name: str | None, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return x if name is None else getattr(self, name)(x)

    def _scaled(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        factor = self.config.residual_multiplier  # in fp32, as PyTorch multiplies by a number: it is not rounded itself
        return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def stem(config: GatedConfig, rngs: nnx.Rngs) -> layers.Embedding:
    """Tokens to hidden states."""
    return layers.Embedding(config.vocab_size, config.hidden_size, scale=config.embedding_scale, rngs=rngs)


def block(config: GatedConfig, rngs: nnx.Rngs) -> GatedBlock:
    """One decoder block."""
    return GatedBlock(config, rngs=rngs)


def head(config: GatedConfig, rngs: nnx.Rngs) -> layers.NormHead:
    """Hidden states to logits."""
    return layers.NormHead(
        norm(config),
        config.vocab_size,
        config.hidden_size,
        divisor=config.logits_scaling,
        softcap=config.logit_softcap,
        rngs=rngs,
    )


def rules(config: GatedConfig) -> tuple[ParamRule, ...]:
    """The table of all tensors."""
    attention = [linear.name for linear in LINEARS if linear.name.startswith("self_attn.")]
    mlp = [linear.name for linear in LINEARS if linear.name.startswith("mlp.")]
    heads = ("self_attn.q_norm", "self_attn.k_norm") if config.qk_norm else ()
    embeddings = "model.embed_tokens.weight"
    tied = config.tie_word_embeddings
    return (
        ParamRule(embeddings, "stem.embedding"),
        *(
            ParamRule(f"{HF_BLOCK}{name}.weight", f"blocks.{{block}}.{name}.scale")
            for name in (*config.norms, *heads)
            if name
        ),
        *linear_rules(HF_BLOCK, attention[:3], bias=config.qkv_bias),
        *linear_rules(HF_BLOCK, attention[3:], bias=config.o_bias),
        *linear_rules(HF_BLOCK, mlp, bias=config.mlp_bias),
        ParamRule("model.norm.weight", "head.norm.scale"),
        ParamRule(embeddings if tied else "lm_head.weight", "head.embedding", tied=tied),
    )


def family(
    name: str, architecture: str, parse_config: Callable[[Mapping[str, Any]], GatedConfig], **differences: Any
) -> Family:
    """A family of what this module has; `differences` are the fields of `Family` in which it is not like Llama."""
    shared: dict[str, Any] = {
        "linears": LINEARS,
        "rules": rules,
        "stem": stem,
        "block": block,
        "head": head,
        "block_constants": block_constants,
    }
    return Family(name=name, architectures=(architecture,), parse_config=parse_config, **{**shared, **differences})
