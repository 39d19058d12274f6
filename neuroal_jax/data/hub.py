"""Rows of the Hugging Face Hub's data sets."""

from collections.abc import Sequence
from typing import Any

from neuroal_jax.errors import UserError


def hub_rows(column: str, *location: str, **options: Any) -> Sequence[str]:
    """A column of a data set; `location` and `options` are `datasets.load_dataset`'s.

    Raises:
        UserError: If the Hub does not give it.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*location, **options)[column]
    except Exception as error:  # datasets raises many kinds: no network, no such revision, a changed layout
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the Hugging Face Hub gave no data ({type(error).__name__}: {reason}): "
            "give a local .txt, .jsonl, .parquet, .npy or .npz file instead, or as NAME=FILE a copy of the data "
            "set's own"
        ) from error
