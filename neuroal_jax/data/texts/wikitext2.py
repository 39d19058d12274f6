"""WikiText-2, raw: lines of articles, joined to one text."""

from collections.abc import Sequence

from neuroal_jax.data.hub import hub_rows
from neuroal_jax.data.reading import Text


def rows(split: str, column: str) -> Sequence[str]:
    """The lines of `train` or `test`."""
    return hub_rows(column, "Salesforce/wikitext", "wikitext-2-raw-v1", split=split)


def text(rows: Sequence[str], split: str) -> Text:
    """One text; the published pruning codes put a blank line between rows to evaluate, and a space to calibrate."""
    return Text([("\n\n" if split == "test" else " ").join(rows)], joined=True)


def row(line: str) -> str:
    """The Hub's rows end in a line break, empty ones have none."""
    return line if line.strip() else ""
