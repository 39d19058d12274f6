"""The registry of search objectives: what a search makes as small as it can. Imports no JAX."""

from dataclasses import dataclass

from neuroal_jax.registry import Entry, Registry


@dataclass(frozen=True, kw_only=True)
class Objective(Entry):
    """An objective: of every linear's input in every block, or else of what the head says in the end.

    The module of one that compares inputs has `score(dense, pruned)`: of the norms `[in]` of an input in the dense and
    in the pruned run. The module of one that reads the head sees the logits of one window, a slice of the vocabulary at
    a time, and gives what is subtracted from their normalizer, as `numerics/loss.py` does:

    - `begin(features, dense)`: what a sum `[token]` begins with;
    - `add(before, logits, tokens, first, dense, dense_logits)`: the sum with one slice more;
    - `score(normalizer, sum, dense)`: the window's score, a number.

    Attributes:
        reads_head: Whether it reads the head; its scores are means over sequences then.
        against_dense: Whether it compares with the dense model's distributions, see `numerics.kl.Dense`; else `dense`
            and `dense_logits` are None.
        least_tokens: With a search set of fewer tokens a search fits what is special to them.
    """

    reads_head: bool = False
    against_dense: bool = False
    least_tokens: int = 0


OBJECTIVES = Registry(
    "neuroal_jax.numerics",
    {
        "alignment": Objective(help="how much pruning changes the pattern of every linear's input"),
        "kl": Objective(
            help="KL divergence of the next-token distributions from the dense model's",
            reads_head=True,
            against_dense=True,
            least_tokens=8 * 256,
        ),
        "loss": Objective(help="next-token loss", reads_head=True, least_tokens=8 * 256),
    },
)
