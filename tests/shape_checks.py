"""Shape annotations are checked in tests, not in users' runs: jaxtyping's hook with beartype."""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a float too

# Where arrays have shapes; before any of them is imported.
PACKAGES = [
    f"neuroal_jax.{name}"
    for name in ("numerics", "models", "allocation", "masks.patterns", "pruners", "refine", "walk")
]


def install() -> None:
    """From now on, functions of these packages that are called with, or return, another shape raise."""
    install_import_hook(PACKAGES, "tests.shape_checks.checked")
