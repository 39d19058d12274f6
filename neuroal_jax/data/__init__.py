"""Text to token windows."""

from neuroal_jax.data.windows import (
    Reader,
    Text,
    Windows,
    check_sources,
    default_seqlen,
    label,
    read_evaluations,
    reader_for,
)

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
