"""`python -m neuroal_jax.prune`: parse, run, report, exit code.

The module can be called: it is the function `neuroal_jax.prune(config)` too.
"""

import logging
import os
import sys
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING

from neuroal_jax.cli import parse_arguments
from neuroal_jax.config import PruneConfig
from neuroal_jax.errors import UserError
from neuroal_jax.interrupts import INTERRUPTED, termination_interrupts

if TYPE_CHECKING:
    from neuroal_jax.pipeline import PruneResult

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done, 2 user error, 130 interrupted)."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("neuroal_jax").setLevel(logging.INFO)
    try:
        with termination_interrupts():
            config = parse_arguments(arguments)
            from neuroal_jax import compilation, pipeline

            compilation.use_cache(config.compilation_cache)
            pipeline.prune(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return INTERRUPTED
    return 0


class _CallableModule(types.ModuleType):
    """Lets `neuroal_jax.prune` be both this module, for `python -m`, and the function of that name."""

    def __call__(self, config: PruneConfig) -> "PruneResult":
        """Prunes a model; see `neuroal_jax.pipeline.prune`."""
        from neuroal_jax import pipeline

        return pipeline.prune(config)


sys.modules[__name__].__class__ = _CallableModule


def program() -> None:
    """The process: `main`, and an end that does not wait for the computation that an interrupt left running."""
    code = main()
    if code == INTERRUPTED:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    program()
