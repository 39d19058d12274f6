"""Layers that families share. Parameters keep their checkpoint's names; norms and softmax compute in fp32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_accurate": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_python": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}
VOCABULARY_PARAMS = ("embedding", "bias")  # of every head: the parameters that have a row, or a number, for each token


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
    """Root-mean-square norm over the last axis; with `unit_offset` the factor is `1 + scale`, as in Gemma.

    Llama rounds to the input's dtype before it scales, Gemma afterwards; so do others, with `wide`.
    """

    def __init__(self, size: int, epsilon: float, *, unit_offset: bool = False, wide: bool = False) -> None:
        self.scale = nnx.Param(jnp.zeros(size) if unit_offset else jnp.ones(size))
        self.epsilon = epsilon
        self.offset = 1.0 if unit_offset else 0.0
        self.wide = wide or unit_offset

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalises in fp32."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        if self.wide:
            return (normed * (self.offset + self.scale[...].astype(jnp.float32))).astype(x.dtype)
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

    def __call__(self, tokens: Integer[Array, "*b t"]) -> Float[Array, "*b t d"]:
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
        divisor: float = 1.0,
        softcap: float | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm = norm
        self.embedding = embedding(vocab, size, rngs)
        self.divisor = divisor
        self.softcap = softcap
        if bias:
            self.bias = nnx.Param(jnp.zeros(vocab))

    def __call__(self, hidden: Float[Array, "*b t d"]) -> Float[Array, "*b t v"]:
        """Logits."""
        return self.logits(self.features(hidden))

    def features(self, hidden: Float[Array, "*b t d"]) -> Float[Array, "*b t d"]:
        """What the vectors of all tokens are multiplied with."""
        normed: Array = self.norm(hidden)
        return normed

    def slopes(self) -> Float[Array, "v d"] | None:
        """By what each feature changes each logit; None where that is not the same for all features."""
        return None if self.softcap is not None else self.embedding[...].astype(jnp.float32) / self.divisor

    def logits(self, features: Float[Array, "*b t d"]) -> Float[Array, "*b t v"]:
        """Logits of features."""
        weight = self.embedding[...]
        logits = jnp.einsum("...d,vd->...v", features, weight, precision=jax.lax.Precision.HIGHEST)
        if hasattr(self, "bias"):
            logits = logits + self.bias[...]
        return softcapped(logits if self.divisor == 1.0 else logits / self.divisor, self.softcap)
