"""`python -m neuroal_jax.prune`: parse, run, report, exit code.

The module can be called: it is the function `neuroal_jax.prune(config)` too, and `help` of it tells that function's.
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
from neuroal_jax.command.parser import make_parser as make_parser
from neuroal_jax.command.parser import parse_arguments
from neuroal_jax.command.program import Messages, run_program

if TYPE_CHECKING:
    from neuroal_jax.run.progress import Listener
    from neuroal_jax.run.result import PruneResult


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, see `run_program`."""
    logging.basicConfig(handlers=[Messages()], level=logging.WARNING)
    logging.getLogger("neuroal_jax").setLevel(logging.INFO)

    def work() -> None:
        config = parse_arguments(arguments)
        from neuroal_jax.machine import compilation
        from neuroal_jax.run import pipeline
        from neuroal_jax.run.progress import Bars

        if config.compilation_cache == AUTO:  # a program may choose; a function leaves JAX as its caller set it up
            compilation.use_default_cache()
        with Bars() as bars:
            pipeline.prune(config, bars)

    return run_program(work)


class _CallableModule(types.ModuleType):
    """Lets `neuroal_jax.prune` be both this module, for `python -m`, and the function of that name."""

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        from neuroal_jax.run import pipeline

        return pipeline.prune.__doc__

    def __call__(self, config: PruneConfig, progress: "Listener | None" = None) -> "PruneResult":
        """Prunes a model; see `neuroal_jax.run.pipeline.prune`."""
        from neuroal_jax.run import pipeline

        return pipeline.prune(config, progress)


sys.modules[__name__].__class__ = _CallableModule


def program() -> NoReturn:
    """The process: `main` and its exit code."""
    as_process(__name__)
