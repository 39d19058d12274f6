"""Causal attention of many sequences: exact, in pieces whose scores fit the cache or the accelerator."""

from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neuroal_jax.models.layers import softcapped

# Attention scores of this many bytes at a time: on a CPU they stay in the cache, an accelerator wants width.
SCORE_BYTES = {"cpu": 8 * 2**20}
SCORE_BYTES_ELSEWHERE = 256 * 2**20
_HEAD_BUNDLES = {"cpu": 3}  # XLA computes a batched product on one core, but several of them on as many


def score_bytes() -> int:
    """Bytes of attention scores that exist at a time, unless one sequence alone has more."""
    return SCORE_BYTES.get(jax.default_backend(), SCORE_BYTES_ELSEWHERE)


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

    def attend_span(begin: int, end: int, query: Array, key: Array, value: Array, window: Array) -> Array:
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

    def attend_sequence(query: Array, key: Array, value: Array, window: Array) -> Array:
        query = query.reshape(tokens, groups, heads // groups, head_dim).transpose(1, 2, 0, 3)
        key, value = key.transpose(1, 0, 2), value.transpose(1, 0, 2)

        def attend_heads(bundle: slice) -> Array:
            parts = [attend_span(*ends, query[bundle], key[bundle], value[bundle], window) for ends in spans]
            return jnp.concatenate(parts, axis=2)

        mixed = jnp.concatenate([attend_heads(bundle) for bundle in bundles])
        return mixed.transpose(2, 0, 1, 3).reshape(tokens, heads, head_dim)

    def attend_sequences(q: Array, k: Array, v: Array, window: Array) -> Array:
        at_once = max(1, min(q.shape[0], score_bytes() // (4 * heads * tokens * tokens)))
        if at_once == q.shape[0]:
            return jax.vmap(attend_sequence, (0, 0, 0, None))(q, k, v, window)
        return jax.lax.map(lambda qkv: attend_sequence(qkv[0], qkv[1], qkv[2], window), (q, k, v), batch_size=at_once)

    return _more_sequences(attend_sequences)(q, k, v, jnp.asarray(tokens if window is None else window, jnp.int32))


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
        if batched[3]:
            raise ValueError("a block has one window")
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
