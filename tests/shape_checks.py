"""Shape annotations are checked in tests, not in users' runs: jaxtyping's hook with beartype."""

from typing import Union

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a float too

# Where arrays have shapes; before any of them is imported.
PACKAGES = [
    f"neuroal_jax.{name}"
    for name in (
        "numerics",
        "models",
        "masks.patterns",
        "pruners",
        "refine",
        "walk",
        "allocation.owl",
        "allocation.alpha",
    )
]


def install() -> None:
    """From now on, functions of these packages that are called with, or return, another shape or dtype raise.

    Tests also call them with NumPy's arrays, as JAX lets them: their shapes count the same.
    """
    jaxtyping.Array = Union[jax.Array, np.ndarray]  # noqa: UP007 (jaxtyping takes no other kind of union)
    jaxtyping.install_import_hook(PACKAGES, "tests.shape_checks.checked")
