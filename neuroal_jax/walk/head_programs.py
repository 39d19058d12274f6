"""What is computed on the head: the programs that end a walk, a slice of the vocabulary after the other."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from neuroal_jax.machine.programs import program
from neuroal_jax.numerics import kl, softmax
from neuroal_jax.numerics.kl import Dense, Expectation
from neuroal_jax.numerics.softmax import Normalizer
from neuroal_jax.walk.programs import module_from


class NextTokens(NamedTuple):
    """What is known of the next tokens of every window, from the slices of the vocabulary so far (fp32).

    Attributes:
        normalizer: Of the logits.
        chosen: The logit of the token that comes next.
    """

    normalizer: Normalizer
    chosen: Float[Array, "b u"]


def no_next_tokens(windows: Int[np.ndarray, "b t"]) -> NextTokens:
    """What is known of the next tokens of windows before the first slice."""
    shape = (len(windows), windows.shape[1] - 1)
    return NextTokens(softmax.no_logits(shape), jnp.zeros(shape))


@program(static=1)
def add_logits(
    graph: nnx.GraphDef,
    params: dict[str, Array],
    hidden: Float[Array, "b t d"],
    tokens: Integer[Array, "b t"],
    first: Int[Array, ""],
    before: NextTokens,
) -> NextTokens:
    """Takes in the logits of a slice of the vocabulary, which begins with token `first`, for one window at a time.

    Args:
        graph: The head's structure.
        params: The head's parameters, of the slice.
        hidden: The last block's output.
        tokens: The windows.
        first: Token id.
        before: Of the slices so far.
    """
    head = module_from(graph, params)

    def of_window(window: tuple[Array, Array, NextTokens]) -> NextTokens:
        hidden, tokens, before = window
        logits = head(hidden[:-1]).astype(jnp.float32)
        chosen = softmax.choose(before.chosen, logits, tokens[1:], first)
        return NextTokens(softmax.add(before.normalizer, logits), chosen)

    return jax.lax.map(of_window, (hidden, tokens, before))


@program()
def window_losses(found: NextTokens) -> Float[Array, "b"]:
    """Mean next-token loss of each window, in nats."""
    return jnp.mean(softmax.losses(found.normalizer, found.chosen), axis=1)


@program(static=1)
def features(graph: nnx.GraphDef, params: dict[str, Array], hidden: Float[Array, "c b t d"]) -> Float[Array, "c b t f"]:
    """What a head multiplies the vectors of all tokens with; `params` may be those of any tokens."""
    found: Array = jax.lax.map(module_from(graph, params).features, hidden)
    return found


@program(static=1, donate="before")
def add_dense(
    graph: nnx.GraphDef, params: dict[str, Array], features: Float[Array, "b t f"], before: Expectation | None
) -> Expectation:
    """Takes in the dense model's logits of a slice of the vocabulary, for one window at a time; None: the first one."""
    head = module_from(graph, params)
    slopes = head.slopes()
    if before is None:
        before = kl.no_expectation(features.shape[:-1], None if slopes is None else features.shape[-1])

    def of_window(window: tuple[Array, Expectation]) -> Expectation:
        features, before = window
        return kl.add_dense(before, head.logits(features).astype(jnp.float32), slopes)

    return jax.lax.map(of_window, (features, before))


@program()
def finish_dense(found: Expectation, features: Float[Array, "b t f"]) -> Dense:
    """What is kept of the dense model's distributions."""
    return kl.finish_dense(found, features)


@program(static=1)
def begin_candidates(objective: Any, features: Float[Array, "c b t f"], dense: Dense | None) -> NextTokens:
    """What is known of candidates before the first slice, `[candidate, window, token]`; see `add_candidates`."""
    chosen = jax.lax.map(lambda features: jax.vmap(objective.begin)(features, dense), features)
    return NextTokens(softmax.no_logits(chosen.shape), chosen)


@program(static=2)
def add_candidates(
    graph: nnx.GraphDef,
    objective: Any,
    params: dict[str, Array],
    features: Float[Array, "c b t f"],
    tokens: Integer[Array, "b t"],
    dense: Dense | None,
    first: Int[Array, ""],
    before: NextTokens,
) -> NextTokens:
    """Takes in the logits of a slice of the vocabulary, for one window of one candidate at a time.

    Args:
        graph: The head's structure.
        objective: Code of an objective that reads the head, see `search/objective.py`.
        params: The head's parameters, of the slice.
        features: Of every candidate.
        tokens: The windows.
        dense: Of the dense model, where the objective compares with it.
        first: Token id of the slice's first one.
        before: Of the slices so far.
    """
    head = module_from(graph, params)

    def of_window(window: Array) -> NextTokens:
        here = jax.tree.map(lambda x: x[window], dense)
        again = here is not None and here.features is not None
        dense_logits = head.logits(here.features).astype(jnp.float32) if again else None

        def of_candidate(candidate: tuple[Array, NextTokens]) -> NextTokens:
            features, before = candidate
            logits = head.logits(features).astype(jnp.float32)
            chosen = objective.add(before.chosen, logits, tokens[window], first, here, dense_logits)
            return NextTokens(softmax.add(before.normalizer, logits), chosen)

        return jax.lax.map(of_candidate, jax.tree.map(lambda x: x[:, window], (features, before)))

    by_window = jax.lax.map(of_window, jnp.arange(tokens.shape[0]))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), by_window)


@program(static=1)
def finish_candidates(objective: Any, found: NextTokens, dense: Dense | None) -> Float[Array, "c b"]:
    """The score of every window under every candidate."""

    def of_candidate(found: NextTokens) -> Float[Array, "b"]:
        scores: Array = jax.vmap(objective.score)(found.normalizer, found.chosen, dense)
        return scores

    scores: Array = jax.lax.map(of_candidate, found)
    return scores
