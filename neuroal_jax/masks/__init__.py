"""Which weights are kept: whole numbers from fractions, and the mask file. The mask file needs no JAX."""

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
