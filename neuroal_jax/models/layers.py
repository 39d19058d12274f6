"""Layers that families share. Parameters keep their checkpoint's names; norms and softmax compute in fp32."""

import math
from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from neuroal_jax.models.hf_config import Rope

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

# Attention scores of this many bytes at a time: on a CPU they stay in the cache, an accelerator wants width.
SCORE_BYTES = {"cpu": 8 * 2**20}
SCORE_BYTES_ELSEWHERE = 256 * 2**20
_HEAD_BUNDLES = {"cpu": 3}  # XLA computes a batched product on one core, but several of them on as many


def score_bytes() -> int:
    """Bytes of attention scores that exist at a time, unless one sequence alone has more."""
    return SCORE_BYTES.get(jax.default_backend(), SCORE_BYTES_ELSEWHERE)


def linear(inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear whose fp32 products are true fp32: accelerators would otherwise round their inputs to TF32."""
    return nnx.Linear(inputs, outputs, use_bias=bias, precision=jax.lax.Precision.HIGHEST, rngs=rngs)


def embedding(rows: int, size: int, rngs: nnx.Rngs) -> nnx.Param:
    """A table of vectors."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, size)))


def softcapped(x: Float[Array, "*b"], cap: float | None) -> Float[Array, "*b"]:
    """Bends values smoothly into (-cap, cap); None leaves them alone."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis; with `unit_offset` the factor is `1 + scale`, as in Gemma."""

    def __init__(self, size: int, epsilon: float, *, unit_offset: bool = False) -> None:
        self.scale = nnx.Param(jnp.zeros(size) if unit_offset else jnp.ones(size))
        self.epsilon = epsilon
        self.unit_offset = unit_offset

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalises in fp32. Hugging Face rounds to `x`'s dtype before it scales, but after with `unit_offset`."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        if self.unit_offset:
            return (normed * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return self.scale[...] * normed.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, in fp32; without `affine` it has no parameters."""

    def __init__(self, size: int, epsilon: float, *, affine: bool = True) -> None:
        self.epsilon = epsilon
        self.affine = affine
        if affine:
            self.scale = nnx.Param(jnp.ones(size))
            self.bias = nnx.Param(jnp.zeros(size))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Subtracts the mean, divides by the deviation, then scales and shifts."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon)
        if self.affine:
            normed = normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return normed.astype(x.dtype)


class Embedding(nnx.Module):
    """Token embeddings: the stem of a model without learned positions."""

    def __init__(self, vocab: int, size: int, *, scale: float = 1.0, rngs: nnx.Rngs) -> None:
        self.embedding = embedding(vocab, size, rngs)
        self.scale = scale

    def __call__(self, tokens: Int[Array, "*b t"]) -> Float[Array, "*b t d"]:
        """Looks up one vector per token."""
        vectors = self.embedding[...][tokens]
        return vectors if self.scale == 1.0 else vectors * jnp.asarray(self.scale, vectors.dtype)


class NormHead(nnx.Module):
    """The final norm and the projection to the vocabulary; `embedding` may be the stem's own (a tied head)."""

    def __init__(
        self,
        norm: nnx.Module,
        vocab: int,
        size: int,
        *,
        bias: bool = False,
        softcap: float | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm = norm
        self.embedding = embedding(vocab, size, rngs)
        self.softcap = softcap
        if bias:
            self.bias = nnx.Param(jnp.zeros(vocab))

    def __call__(self, hidden: Float[Array, "*b t d"]) -> Float[Array, "*b t v"]:
        """Logits."""
        weight = self.embedding[...]
        logits = jnp.einsum("...d,vd->...v", self.norm(hidden), weight, precision=jax.lax.Precision.HIGHEST)
        if hasattr(self, "bias"):
            logits = logits + self.bias[...]
        return softcapped(logits, self.softcap)


def rope_frequencies(head_dim: int, rope: Rope) -> Float[np.ndarray, "half"]:
    """Rotation per position, in radians, of each pair of dimensions; `llama3` slows the long waves down."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1.0) / np.float32(rope.theta) ** exponents
    if rope.original_max_position_embeddings is None:
        return plain
    turns = rope.original_max_position_embeddings * plain / np.float32(2 * math.pi)  # over the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / rope.factor


def rotate(x: Float[Array, "b t n h"], frequencies: Float[np.ndarray, "half"]) -> Float[Array, "b t n h"]:
    """Rotates dimension i against i + h/2, Hugging Face's layout of rotary embeddings."""
    angles = np.arange(x.shape[1], dtype=np.float32)[:, None, None] * frequencies
    # Constants of the program: XLA would compute a sine or cosine again for every sequence, head and use.
    cos, sin = (jnp.asarray(table(angles), x.dtype) for table in (np.cos, np.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t g h"],
    v: Float[Array, "b t g h"],
    *,
    scale: float,
    softcap: float | None = None,
    window: Int[Array, ""] | int | None = None,
) -> Float[Array, "b t n h"]:
    """Causal softmax attention, n query heads sharing g key/value heads in order.

    A few sequences at a time, so that `tokens x tokens` scores never exist for the whole batch; and a span of queries
    at a time, so that of the pairs which the mask excludes only few are computed.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        scale: Factor of the scores.
        softcap: Bound that the scores approach, or None.
        window: How many positions a token sees, itself included; None: all before it.
    """
    tokens, heads, head_dim = q.shape[1:]
    groups = k.shape[2]

    spans = _parts(tokens, min(max(tokens // 128, 2), 4))  # few, as each is compiled; more where there is more to skip
    bundles = [slice(*ends) for ends in _parts(groups, _HEAD_BUNDLES.get(jax.default_backend(), 1))]
    precision = jax.lax.Precision.HIGHEST

    def some_queries(begin: int, end: int, query: Array, key: Array, value: Array, window: Array) -> Array:
        """Queries `begin` to `end`; no key after the last of them is looked at."""
        query, key, value = query[:, :, begin:end], key[:, :end], value[:, :end]
        back = jnp.arange(begin, end)[:, None] - jnp.arange(end)
        visible = (back >= 0) & (back < window)
        scores = jnp.einsum("grth,gsh->grts", query, key, precision=precision, preferred_element_type=jnp.float32)
        scores = jnp.where(visible, softcapped(scores * scale, softcap), -jnp.inf)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum(
            "grts,gsh->grth",
            weights.astype(value.dtype),
            value,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return (mixed / total).astype(value.dtype)

    def one(query: Array, key: Array, value: Array, window: Array) -> Array:
        query = query.reshape(tokens, groups, heads // groups, head_dim).transpose(1, 2, 0, 3)
        key, value = key.transpose(1, 0, 2), value.transpose(1, 0, 2)

        def some_heads(some: slice) -> Array:
            parts = [some_queries(*ends, query[some], key[some], value[some], window) for ends in spans]
            return jnp.concatenate(parts, axis=2)

        mixed = jnp.concatenate([some_heads(some) for some in bundles])
        return mixed.transpose(2, 0, 1, 3).reshape(tokens, heads, head_dim)

    def attend(q: Array, k: Array, v: Array, window: Array) -> Array:
        together = max(1, min(q.shape[0], score_bytes() // (4 * heads * tokens * tokens)))
        if together == q.shape[0]:
            return jax.vmap(one, (0, 0, 0, None))(q, k, v, window)
        return jax.lax.map(lambda qkv: one(qkv[0], qkv[1], qkv[2], window), (q, k, v), batch_size=together)

    return _more_sequences(attend)(q, k, v, jnp.asarray(tokens if window is None else window, jnp.int32))


def _parts(length: int, number: int) -> list[tuple[int, int]]:
    """Begins and ends of at most `number` even parts of a length."""
    edges = [length * i // number for i in range(number + 1)]
    return [(begin, end) for begin, end in pairwise(edges) if begin < end]


def _more_sequences(attend: Callable[..., Array]) -> Callable[..., Array]:
    """Lets `vmap` (over lambda candidates, say) give `attend(q, k, v, window)` more sequences instead of a new axis.

    With a new axis, all candidates would have scores at a time.
    """
    batched_as_sequences = jax.custom_batching.custom_vmap(attend)

    @batched_as_sequences.def_vmap
    def rule(size: int, batched: list[bool], *arrays: Array) -> tuple[Array, bool]:
        *qkv, window = arrays
        assert not batched[3], "a block has one window"
        whole = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(qkv, batched, strict=False)]
        flat = [x.reshape(-1, *x.shape[2:]) for x in whole]
        return batched_as_sequences(*flat, window).reshape(whole[0].shape), True

    # Functions with a rule for vmap have no derivative of their own; fine-tuning needs one.
    differentiable = jax.custom_vjp(lambda q, k, v, window: batched_as_sequences(q, k, v, window))

    def forward(*arrays: Array) -> tuple[Array, tuple[Array, ...]]:
        return batched_as_sequences(*arrays), arrays

    def backward(arrays: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
        q, k, v, window = arrays
        return (*jax.vjp(lambda q, k, v: attend(q, k, v, window), q, k, v)[1](gradient), None)

    differentiable.defvjp(forward, backward)
    return differentiable
