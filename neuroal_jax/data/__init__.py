"""Text to token windows. Which texts are known is told without NumPy."""

from typing import TYPE_CHECKING

from neuroal_jax.lazy import lazy_names

if TYPE_CHECKING:
    from neuroal_jax.data.reading import Text
    from neuroal_jax.data.sources import check_sources, label
    from neuroal_jax.data.windows import Reader, Windows, default_seqlen, read_evaluations, reader_for
else:
    _WINDOWS = ("Reader", "Windows", "default_seqlen", "read_evaluations", "reader_for")
    __getattr__ = lazy_names(
        __name__,
        {
            "Text": "neuroal_jax.data.reading",
            "check_sources": "neuroal_jax.data.sources",
            "label": "neuroal_jax.data.sources",
            **dict.fromkeys(_WINDOWS, "neuroal_jax.data.windows"),
        },
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
