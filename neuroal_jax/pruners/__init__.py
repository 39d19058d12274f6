"""The registry of pruners: how important is each weight. A pruner never decides how many weights go."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float

from neuroal_jax.pruners import magnitude, multiflow, wanda

Scores = Callable[[Float[Array, "out in"], Float[Array, "in"]], Float[Array, "out in"]]


@dataclass(frozen=True)
class Pruner:
    """A pruner of one 2-D weight.

    Attributes:
        scores: `scores(weight[out, in], norms[in]) -> [out, in]`, fp32, non-negative; in each row the lowest go.
        needs_statistics: Whether the scores depend on the inputs' norms.
    """

    scores: Scores
    needs_statistics: bool = True


PRUNERS = {
    "magnitude": Pruner(magnitude.scores, needs_statistics=False),
    "wanda": Pruner(wanda.scores),
    "multiflow": Pruner(multiflow.scores),
}
