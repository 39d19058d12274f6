"""Penn Treebank: sentences without punctuation and rare words, joined to one text."""

from collections.abc import Sequence

from neuroal_jax.data.hub import hub_rows
from neuroal_jax.data.reading import Text


def rows(split: str, column: str) -> Sequence[str]:
    """The sentences of `train` or `test`.

    The data set's own loader is a script, which is never run: the Hub's conversion to parquet is read instead.
    """
    return hub_rows(column, "ptb-text-only/ptb_text_only", revision="refs/convert/parquet", split=split)


def text(rows: Sequence[str], split: str) -> Text:
    """One text, with a space between sentences."""
    return Text([" ".join(rows)], joined=True)


def row(line: str) -> str:
    """The Hub's rows have no white space around them."""
    return line.strip()
