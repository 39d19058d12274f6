"""The version of this package, and of what results depend on. Imports next to nothing: every program starts here."""

from collections.abc import Iterable

try:  # written by setuptools-scm, from the git tag, when the package is built or installed
    from neuroal_jax._version import __version__ as __version__
except ImportError:
    __version__ = "0.0"  # a checkout that was never installed; pyproject.toml has it for builds without git

RESULT_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax", "safetensors", "transformers", "datasets")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of this package, Python and other packages, none of which is imported for it."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    found = {package: installed(package) for package in packages}
    return {"neuroal_jax": __version__, "python": platform.python_version(), **found}
