"""The registry of patterns: which weights of a linear compete with each other. Imports no JAX."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from neuroal_jax.registry import Entry, Registry

if TYPE_CHECKING:
    import numpy as np

    from neuroal_jax.numerics.selection import Quota

Shape = tuple[int, int]  # (out, in)


@runtime_checkable
class Pattern(Protocol):
    """Which weights compete. It owns counting, how many of each set of competitors go, and selecting. Hashable."""

    def split(
        self, sparsity: "float | np.ndarray", shape: Shape, total: int, least: "np.ndarray | None" = None
    ) -> "Quota":
        """How many go of every set of competitors, `total` in all.

        Args:
            sparsity: Of the linear, or of each of its rows.
            shape: `(out, in)` of the linear.
            total: Sum of the result.
            least: How many go of every set at least; by default none.
        """

    def count(self, packed: "np.ndarray", shape: Shape) -> "np.ndarray":
        """How many bits are set in every set of competitors, of bits that are packed along the input axis."""

    def round_down(self, sparsity: "float | np.ndarray", shape: Shape) -> "Quota":
        """The released code's numbers; raises UserError where it has none for such an allocation."""

    def select(self, scores: Any, quota: "Quota") -> Any:
        """Marks the lowest `scores[out, in]` of every set of competitors, as many as `quota` says."""


@dataclass(frozen=True, kw_only=True)
class PatternEntry(Entry):
    """A pattern; its module has `make(size)`, which gives a `Pattern`.

    Attributes:
        by_row: Whether every row has a number of its own, so that an allocation can tell rows apart.
    """

    by_row: bool


PATTERNS = Registry(
    "neuroal_jax.masks.patterns",
    {
        "rows": PatternEntry(help="every row of a linear competes alone", by_row=True),
        "columns": PatternEntry(help="all rows of a group of columns compete", by_row=False),
    },
)


def make_pattern(name: str, size: int | None = None) -> Pattern:
    """A registered pattern; `size` is its number, for those that have one."""
    pattern: Pattern = PATTERNS.module(name).make(size)
    return pattern
