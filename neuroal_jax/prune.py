"""`python -m neuroal_jax.prune`: parse, run, report, exit code.

The module can be called: it is the function `neuroal_jax.prune(config)` too.
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

import logging
import sys
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from neuroal_jax.command.config import AUTO, PruneConfig
from neuroal_jax.command.parser import parse_arguments
from neuroal_jax.command.program import Messages, run_program

if TYPE_CHECKING:
    from neuroal_jax.run.pipeline import PruneResult


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, see `run_program`."""
    logging.basicConfig(handlers=[Messages()], level=logging.WARNING)
    logging.getLogger("neuroal_jax").setLevel(logging.INFO)

    def work() -> None:
        config = parse_arguments(arguments)
        from neuroal_jax.machine import compilation
        from neuroal_jax.run import pipeline

        if config.compilation_cache == AUTO:  # a program may choose; a function leaves JAX as its caller set it up
            compilation.use_default_cache()
        pipeline.prune(config)

    return run_program(work)


class _CallableModule(types.ModuleType):
    """Lets `neuroal_jax.prune` be both this module, for `python -m`, and the function of that name."""

    def __call__(self, config: PruneConfig) -> "PruneResult":
        """Prunes a model; see `neuroal_jax.run.pipeline.prune`."""
        from neuroal_jax.run import pipeline

        return pipeline.prune(config)


sys.modules[__name__].__class__ = _CallableModule


def program() -> NoReturn:
    """The process: `main` and its exit code."""
    as_process(__name__)
