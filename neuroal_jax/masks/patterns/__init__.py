"""The registry of patterns: which weights of a linear compete with each other. Imports no JAX."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from neuroal_jax.registry import Entry, Registry

if TYPE_CHECKING:
    import numpy as np

    from neuroal_jax.numerics.selection import Quota

Shape = tuple[int, int]  # (out, in)
NONE, AUTO = "none", "auto"  # of `--pattern`: no groups of neighbours; each block its own number of them
N_OF_M = "n_of_m"


@dataclass(frozen=True)
class KeptOf:
    """What `--pattern` asks for: so many of every few neighbouring inputs of a row stay.

    Attributes:
        kept: N; None where every block has a number of its own.
        size: M.
    """

    kept: int | None
    size: int

    @property
    def sparsity(self) -> float | None:
        """Share of the weights that go; None where that is a choice."""
        return None if self.kept is None else 1 - self.kept / self.size

    def __str__(self) -> str:
        return f"{AUTO if self.kept is None else self.kept}:{self.size}"


def read_pattern(text: str) -> KeptOf | None:
    """What `2:4` or `auto:8` asks for; None for `none`.

    Raises:
        ValueError: If it is none of these.
    """
    if text == NONE:
        return None
    match = re.fullmatch(rf"({AUTO}|[0-9]{{1,6}}):([0-9]{{1,6}})", text)
    if match is None:
        raise ValueError(f"{text!r} is no pattern")
    kept, size = None if match[1] == AUTO else int(match[1]), int(match[2])
    if size < 2 or (kept is not None and not 0 < kept < size):
        raise ValueError(f"{text!r} keeps all or nothing")
    return KeptOf(kept, size)


@runtime_checkable
class Pattern(Protocol):
    """Which weights compete. It owns counting, how many of each set of competitors go, and selecting. Hashable."""

    @property
    def steps(self) -> int | None:
        """In how many equal steps the number of a whole linear goes up; None: by single weights."""

    @property
    def neighbours(self) -> int | None:
        """Within how many neighbours of its row a weight may change places with another; None: within the row."""

    def together(self, width: int) -> int:
        """How many columns are decided at a time where columns are pruned in turn."""

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

    def select_columns(self, scores: Any, quota: "Quota", number: Any) -> Any:
        """`select` in the columns that are decided together, from `number` times as many on: `scores[out, together]`.

        The scores of zeros that are to go first are below all others.
        """


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
        N_OF_M: PatternEntry(help="every few neighbouring inputs of a row compete", by_row=False),
    },
)


def make_pattern(name: str, size: int | None = None) -> Pattern:
    """A registered pattern; `size` is its number, for those that have one."""
    pattern: Pattern = PATTERNS.module(name).make(size)
    return pattern
