"""GPT-NeoX and Pythia: q, k and v of each head side by side in one tensor, attention and MLP in parallel or not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from neuroal_jax.errors import UserError
from neuroal_jax.models import hf_config, layers
from neuroal_jax.models.attention import causal_attention
from neuroal_jax.models.family import QKV, Family, LinearSpec, ParamRule, linear_rules
from neuroal_jax.models.rope import ROPE_ATTRIBUTES, Rope, rope_values, rotate_part, take_partial_rope, take_renamed

# With parallel residuals, `dense` feeds the next block alone. mlp_input, and so D - S of it, is the same in a dense and
# in a pruned block then: its rows are not told apart, like those of all that feeds the next block.
LINEARS = (
    LinearSpec("attention.query_key_value", reads="attention_input", fused=QKV, interleaved=True),
    LinearSpec("attention.dense", reads="attention_output", feeds="mlp_input"),
    LinearSpec("mlp.dense_h_to_4h", reads="mlp_input", feeds="mlp_hidden", in_mlp=True),
    LinearSpec("mlp.dense_4h_to_h", reads="mlp_hidden", feeds="attention_input", feeds_next_block=True, in_mlp=True),
)
_HF = "gpt_neox."
_BLOCK = _HF + "layers.{block}."
_OWN_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}  # by the usual ones
_SHARE = 0.25  # of the dimensions of a head that are rotated, by default
# Attributes of config.json that are read, or that only training reads; all others are refused.
_ATTRIBUTES = ROPE_ATTRIBUTES | frozenset(
    """
    attention_bias classifier_dropout head_dim hidden_act hidden_dropout hidden_size intermediate_size layer_norm_eps
    layer_types max_position_embeddings num_attention_heads num_hidden_layers rotary_emb_base rotary_pct
    tie_word_embeddings use_parallel_residual vocab_size
    """.split()
)


@dataclass(frozen=True)
class GPTNeoXConfig:
    """What the forward pass needs of config.json, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float
    rope: Rope
    hidden_act: str
    attention_bias: bool
    use_parallel_residual: bool
    tie_word_embeddings: bool

    @property
    def num_key_value_heads(self) -> int:
        """As many as there are heads."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_attention_heads


def parse_config(config: Mapping[str, Any]) -> GPTNeoXConfig:
    """Reads config.json, refusing what is not implemented."""
    hf_config.check_attributes(config, _ATTRIBUTES)
    hidden, heads = hf_config.take_int(config, "hidden_size"), hf_config.take_int(config, "num_attention_heads")
    if hidden % heads or config.get("head_dim") not in (None, hidden // heads):
        size = f" times head_dim {config['head_dim']!r}" if config.get("head_dim") is not None else ""
        raise UserError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}{size}")
    blocks = hf_config.take_int(config, "num_hidden_layers", high=hf_config.MAX_BLOCKS)
    hf_config.refuse_windows(config, blocks)
    max_positions = hf_config.take_int(config, "max_position_embeddings", 2048)
    return GPTNeoXConfig(
        vocab_size=hf_config.take_int(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=hf_config.take_int(config, "intermediate_size"),
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=max_positions,
        layer_norm_eps=hf_config.take_float(config, "layer_norm_eps", 1e-5),
        rope=take_partial_rope(_usual_rotation(config), hidden // heads, max_positions, _SHARE),
        hidden_act=hf_config.take_choice(config, "hidden_act", layers.ACTIVATIONS, "gelu"),
        attention_bias=hf_config.take_bool(config, "attention_bias", True),
        use_parallel_residual=hf_config.take_bool(config, "use_parallel_residual", True),
        tie_word_embeddings=hf_config.take_bool(config, "tie_word_embeddings", False),
    )


def _usual_rotation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose rotation has its usual names. Of those outside of `rope_parameters`, transformers reads none.

    Raises:
        UserError: If one of them says something else than what is read.
    """
    own = {key: take_renamed(config, name, key, config.get("rope_parameters")) for key, name in _OWN_NAMES.items()}
    usual = {key: value for key, value in config.items() if key not in _OWN_NAMES}
    usual |= {key: value for key, value in own.items() if value is not None}
    read = {"partial_rotary_factor": _SHARE, **rope_values(usual)}
    for key, name in _OWN_NAMES.items():
        if config.get(key) is not None and config[key] != read[key]:
            raise UserError(
                f"config.json: {key} is {config[key]!r}, but GPT-NeoX reads {name}, which is {read[key]!r}: remove one"
            )
    return usual


class Attention(nnx.Module):
    """Multi-head attention whose linear gives each head's query, key and value together."""

    def __init__(self, config: GPTNeoXConfig, *, rngs: nnx.Rngs) -> None:
        size, bias = config.hidden_size, config.attention_bias
        self.config = config
        self.query_key_value = layers.linear(size, 3 * size, bias=bias, rngs=rngs)
        self.dense = layers.linear(size, size, bias=bias, rngs=rngs)

    def mix(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Everything up to dense's input."""
        config = self.config
        heads = self.query_key_value(x).reshape(*x.shape[:2], config.num_attention_heads, 3 * config.head_dim)
        q, k, v = jnp.split(heads, 3, axis=-1)
        q, k = rotate_part(q, config.rope), rotate_part(k, config.rope)
        return causal_attention(q, k, v, scale=config.head_dim**-0.5).reshape(x.shape)


class MLP(nnx.Module):
    """Two linears and an activation."""

    def __init__(self, config: GPTNeoXConfig, *, rngs: nnx.Rngs) -> None:
        self.dense_h_to_4h = layers.linear(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)
        self.dense_4h_to_h = layers.linear(config.intermediate_size, config.hidden_size, bias=True, rngs=rngs)


class GPTNeoXBlock(nnx.Module):
    """One decoder block."""

    def __init__(self, config: GPTNeoXConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.input_layernorm = layers.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = layers.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, hidden: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """Returns the block's output and the inputs of its linears, by the names in `LINEARS`."""
        attention_input = self.input_layernorm(hidden)
        attention_output = self.attention.mix(attention_input)
        attended = hidden + self.attention.dense(attention_output)
        mlp_input = self.post_attention_layernorm(hidden if self.config.use_parallel_residual else attended)
        mlp_hidden = layers.ACTIVATIONS[self.config.hidden_act](self.mlp.dense_h_to_4h(mlp_input))
        inputs = {
            "attention_input": attention_input,
            "attention_output": attention_output,
            "mlp_input": mlp_input,
            "mlp_hidden": mlp_hidden,
        }
        return attended + self.mlp.dense_4h_to_h(mlp_hidden), inputs


def head(config: GPTNeoXConfig, rngs: nnx.Rngs) -> layers.NormHead:
    """Hidden states to logits."""
    norm = layers.LayerNorm(config.hidden_size, config.layer_norm_eps)
    return layers.NormHead(norm, config.vocab_size, config.hidden_size, rngs=rngs)


def rules(config: GPTNeoXConfig) -> tuple[ParamRule, ...]:
    """The table of all tensors; the head under the name that it has in files."""
    embeddings, tied = f"{_HF}embed_in.weight", config.tie_word_embeddings
    norms = [
        (f"{_BLOCK}{name}", f"blocks.{{block}}.{name}") for name in ("input_layernorm", "post_attention_layernorm")
    ]
    norms += [(f"{_HF}final_layer_norm", "head.norm")]
    attention, mlp = ([linear.name for linear in LINEARS if linear.in_mlp == in_mlp] for in_mlp in (False, True))
    return (
        ParamRule(embeddings, "stem.embedding"),
        *(ParamRule(f"{hf}.weight", f"{flax}.scale") for hf, flax in norms),
        *(ParamRule(f"{hf}.bias", f"{flax}.bias") for hf, flax in norms),
        *linear_rules(_BLOCK, attention, bias=config.attention_bias),
        *linear_rules(_BLOCK, mlp, bias=True),
        ParamRule(embeddings if tied else "embed_out.weight", "head.embedding", tied=tied),
    )


FAMILY = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    parse_config=parse_config,
    linears=LINEARS,
    rules=rules,
    stem=lambda config, rngs: layers.Embedding(config.vocab_size, config.hidden_size, rngs=rngs),
    block=lambda config, rngs: GPTNeoXBlock(config, rngs=rngs),
    head=head,
)
