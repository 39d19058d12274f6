"""The demo model's text, in the package: documents to calibrate, one text to evaluate."""

from collections.abc import Sequence

from neuroal_jax.checkpoint.locate import DEMO
from neuroal_jax.data.reading import Text, read_text

_FILES = {"train": "calibration.jsonl", "test": "evaluation.txt"}


def rows(split: str, column: str) -> Sequence[str]:
    """The documents of `train`, or the one text of `test`."""
    return read_text(DEMO / _FILES[split], column).documents


def text(rows: Sequence[str], split: str) -> Text:
    """As the files have it."""
    return Text(rows, joined=split == "test")
