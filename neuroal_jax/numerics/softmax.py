"""Softmax over more logits than exist at a time: its normalizer, streamed from slices of the vocabulary."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Normalizer(NamedTuple):
    """The logarithm of a sum of exponentials, so far: `largest + log(total)` (fp32).

    Attributes:
        largest: The largest logit.
        total: The sum of `exp(logit - largest)`.
    """

    largest: Float[Array, "*b"]
    total: Float[Array, "*b"]


def no_logits(shape: tuple[int, ...]) -> Normalizer:
    """What a normalizer begins with."""
    return Normalizer(jnp.full(shape, -jnp.inf), jnp.zeros(shape))


def add(before: Normalizer, logits: Float[Array, "*b v"]) -> Normalizer:
    """Takes in the logits (fp32) of a slice of the vocabulary."""
    largest = jnp.maximum(before.largest, jnp.max(logits, axis=-1))
    total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    return Normalizer(largest, before.total * jnp.exp(before.largest - largest) + total)


def choose(
    before: Float[Array, "*b"], logits: Float[Array, "*b v"], tokens: Int[Array, "*b"], first: Int[Array, ""]
) -> Float[Array, "*b"]:
    """The logits of `tokens`, where they are in a slice of the vocabulary that begins with token `first`."""
    place = tokens - first
    within = (place >= 0) & (place < logits.shape[-1])
    found = jnp.take_along_axis(logits, jnp.where(within, place, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(within, found, before)


def losses(normalizer: Normalizer, chosen: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Minus the log-probability of the chosen logits, in nats."""
    return jnp.log(normalizer.total) + normalizer.largest - chosen
