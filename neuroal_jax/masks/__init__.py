"""Which weights are kept: whole numbers from fractions, and the mask file, which needs no JAX."""

from typing import TYPE_CHECKING

from neuroal_jax.lazy import lazy_names

__all__ = [
    "FORMAT",
    "PackedMasks",
    "check_fit",
    "check_pruned",
    "check_source",
    "load_masks",
    "masks_of",
    "pruned_problem",
    "read_masks",
    "save_masks",
]

if TYPE_CHECKING:
    from neuroal_jax.masks.file import (
        FORMAT,
        PackedMasks,
        check_fit,
        check_pruned,
        check_source,
        load_masks,
        masks_of,
        pruned_problem,
        read_masks,
        save_masks,
    )
else:
    __getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "neuroal_jax.masks.file"))
