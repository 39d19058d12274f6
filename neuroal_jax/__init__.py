"""neuroal-jax: zeroth-order, adaptive pruning of language models without re-training.

    import neuroal_jax
    result = neuroal_jax.prune(neuroal_jax.PruneConfig(model="demo", sparsity=0.7, out="run"))

Names are imported on first use: the command line's `--help` and the PyTorch side need no JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from neuroal_jax.lazy import lazy_names
from neuroal_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from neuroal_jax.command.config import PruneConfig
    from neuroal_jax.errors import UserError
    from neuroal_jax.finetune import keep_pruned, load_model, mask_tree
    from neuroal_jax.masks import load_masks
    from neuroal_jax.run.pipeline import prune
    from neuroal_jax.run.progress import Progress
    from neuroal_jax.run.result import PruneResult
else:
    _lazy = lazy_names(
        __name__,
        {
            "PruneConfig": "neuroal_jax.command.config",
            "Progress": "neuroal_jax.run.progress",
            "PruneResult": "neuroal_jax.run.result",
            "UserError": "neuroal_jax.errors",
            "load_masks": "neuroal_jax.masks.file",
            "keep_pruned": "neuroal_jax.finetune",
            "mask_tree": "neuroal_jax.finetune",
            "load_model": "neuroal_jax.finetune",
        },
    )

    def __getattr__(name: str) -> Any:
        if name == "prune":
            return import_module("neuroal_jax.prune")  # a module that can be called
        return _lazy(name)


__all__ = [
    "Progress",
    "PruneConfig",
    "PruneResult",
    "UserError",
    "keep_pruned",
    "load_masks",
    "load_model",
    "mask_tree",
    "prune",
]
