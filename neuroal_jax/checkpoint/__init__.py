"""Models on disk. Where a model lies and what its files hold is told without JAX."""

from typing import TYPE_CHECKING

from neuroal_jax.lazy import lazy_names

__all__ = ["BlockWeights", "Checkpoint", "ConfigFile", "open_checkpoint", "read_config"]

if TYPE_CHECKING:
    from neuroal_jax.checkpoint.opened import BlockWeights, Checkpoint, ConfigFile, open_checkpoint, read_config
else:
    __getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "neuroal_jax.checkpoint.opened"))
