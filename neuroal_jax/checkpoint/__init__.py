"""Models on disk. Names are imported on first use: where a model lies and what its files hold is told without JAX."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuroal_jax.checkpoint.opened import BlockWeights, Checkpoint, ConfigFile, open_checkpoint, read_config

__all__ = ["BlockWeights", "Checkpoint", "ConfigFile", "open_checkpoint", "read_config"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return getattr(import_module("neuroal_jax.checkpoint.opened"), name)
        raise AttributeError(f"module 'neuroal_jax.checkpoint' has no attribute '{name}'")
