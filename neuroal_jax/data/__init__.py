"""Text to token windows."""

from neuroal_jax.data.reading import Text
from neuroal_jax.data.sources import check_sources, label
from neuroal_jax.data.windows import Reader, Windows, default_seqlen, read_evaluations, reader_for

__all__ = [
    "Reader",
    "Text",
    "Windows",
    "check_sources",
    "default_seqlen",
    "label",
    "read_evaluations",
    "reader_for",
]
