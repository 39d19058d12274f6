"""C4, English: documents, of which the first file of each split is read."""

from collections.abc import Sequence

from neuroal_jax.data.hub import hub_rows
from neuroal_jax.data.reading import Text

_SPLITS = {"train": "train", "test": "validation"}  # C4 has no test split
_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
_EVALUATION_DOCUMENTS = 1100  # the usual cut of the validation split, before that to 256 windows


def rows(split: str, column: str) -> Sequence[str]:
    """The documents of the first file."""
    name = _SPLITS[split]
    return hub_rows(column, "allenai/c4", data_files={name: _FILES[name]}, split=name)


def text(rows: Sequence[str], split: str) -> Text:
    """Documents, each sampled on its own; to evaluate, the first 1100."""
    return Text(rows if split == "train" else list(rows[:_EVALUATION_DOCUMENTS]), joined=False)
