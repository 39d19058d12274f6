"""The next-token loss: how improbable a model finds the tokens that come next, in nats."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neuroal_jax.numerics import softmax
from neuroal_jax.numerics.softmax import Normalizer


def begin(features: Float[Array, "t f"], dense: None) -> Float[Array, "t"]:
    """The logits of the tokens that come next, of which no slice has been seen."""
    del dense
    return jnp.zeros(features.shape[0])


def add(
    before: Float[Array, "t"],
    logits: Float[Array, "t v"],
    tokens: Int[Array, "t"],
    first: Int[Array, ""],
    dense: None,
    dense_logits: None,
) -> Float[Array, "t"]:
    """Takes in a slice of the vocabulary that begins with token `first`; nothing comes after the last token."""
    del dense, dense_logits
    following = jnp.concatenate([tokens[1:], jnp.full(1, -1, tokens.dtype)])
    return softmax.choose(before, logits, following, first)


def score(normalizer: Normalizer, chosen: Float[Array, "t"], dense: None) -> Float[Array, ""]:
    """The mean over all tokens but the last."""
    del dense
    return jnp.mean(softmax.losses(normalizer, chosen)[:-1])
