"""KL(dense || pruned) of the next-token distributions, in nats, from logits of which one slice exists at a time.

With the dense model's probabilities p and entropy H, and the pruned model's logits z,

    KL = log sum_v exp z_v - sum_v p_v z_v - H(p)

Where logits are linear in a head's features x, `z_v = w_v . x + b_v`, the sum in the middle is `e . x + sum_v p_v b_v`
with the expected slope `e = sum_v p_v w_v`: what is kept of p is e, one vector a token, and no candidate needs p again.
Where they are not (a softcap), the dense features are kept, of which p is computed again for every slice.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neuroal_jax.numerics import softmax
from neuroal_jax.numerics.softmax import Normalizer


class Dense(NamedTuple):
    """What is kept of the dense model's distribution at every token (fp32).

    Attributes:
        normalizer: The logarithm of the sum of its exponentials.
        entropy: H(p).
        offset: The expected logit less `e . x`; of no meaning without e.
        slope: e; None where logits are not linear in features.
        features: What the logits follow from; None where e is enough.
    """

    normalizer: Float[Array, "*b t"]
    entropy: Float[Array, "*b t"]
    offset: Float[Array, "*b t"]
    slope: Float[Array, "*b t f"] | None
    features: Float[Array, "*b t f"] | None


class Expectation(NamedTuple):
    """Sums over the slices so far, each term times `exp(logit - largest)` (fp32)."""

    normalizer: Normalizer
    logit: Float[Array, "*b t"]
    slope: Float[Array, "*b t f"] | None


def no_expectation(shape: tuple[int, ...], width: int | None) -> Expectation:
    """What sums at tokens of a `shape` begin with; `width` is that of the features where logits are linear in them."""
    slope = None if width is None else jnp.zeros((*shape, width))
    return Expectation(softmax.no_logits(shape), jnp.zeros(shape), slope)


def add_dense(before: Expectation, logits: Float[Array, "t v"], slopes: Float[Array, "v f"] | None) -> Expectation:
    """Takes in the dense logits (fp32) of a slice, and by what features change them where that is linear."""
    normalizer = softmax.add(before.normalizer, logits)
    fade = jnp.exp(before.normalizer.largest - normalizer.largest)
    weights = jnp.exp(logits - normalizer.largest[:, None])
    logit = before.logit * fade + jnp.sum(weights * logits, axis=-1)
    if before.slope is None or slopes is None:
        return Expectation(normalizer, logit, None)
    slope = jnp.matmul(weights, slopes.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return Expectation(normalizer, logit, before.slope * fade[:, None] + slope)


def finish_dense(found: Expectation, features: Float[Array, "*b t f"]) -> Dense:
    """What to keep of sums over the whole vocabulary."""
    total = found.normalizer.total
    normalizer, logit = jnp.log(total) + found.normalizer.largest, found.logit / total
    if found.slope is None:
        return Dense(normalizer, normalizer - logit, jnp.zeros_like(logit), None, features)
    slope = found.slope / total[..., None]
    return Dense(normalizer, normalizer - logit, logit - _along(slope, features), slope, None)


def begin(features: Float[Array, "t f"], dense: Dense) -> Float[Array, "t"]:
    """The expected logit under p of a model with these features, as far as it takes no logits."""
    return jnp.zeros(features.shape[0]) if dense.slope is None else dense.offset + _along(dense.slope, features)


def add(
    before: Float[Array, "t"],
    logits: Float[Array, "t v"],
    tokens: Int[Array, "t"],
    first: Int[Array, ""],
    dense: Dense,
    dense_logits: Float[Array, "t v"] | None,
) -> Float[Array, "t"]:
    """Takes in a slice of the vocabulary; dense logits come where p is computed again."""
    del tokens, first
    if dense_logits is None:
        return before
    return before + jnp.sum(jnp.exp(dense_logits - dense.normalizer[:, None]) * logits, axis=-1)


def score(normalizer: Normalizer, chosen: Float[Array, "t"], dense: Dense) -> Float[Array, ""]:
    """The mean over all tokens."""
    return jnp.mean(softmax.losses(normalizer, chosen) - dense.entropy)


def _along(slope: Float[Array, "*b t f"], features: Float[Array, "*b t f"]) -> Float[Array, "*b t"]:
    return jnp.sum(slope * features.astype(jnp.float32), axis=-1)
