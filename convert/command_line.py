"""The command line that programs have in common which write a whole checkpoint in another form."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.command.values import path_to


class Conversion(Protocol):
    """What writes the checkpoint."""

    def __call__(self, model: str, out: Path, *, overwrite: bool) -> None:
        """Reads `model` and writes the directory `out`."""


def run_conversion(convert: Conversion, arguments: Sequence[str] | None, program: str, help: str, model: str) -> int:
    """Runs a command line; returns the exit code.

    Args:
        convert: What the program does.
        arguments: Of the command line; None: the process's.
        program: The module's name.
        help: What the program does, for `--help`.
        model: What `--model` takes, for `--help`.
    """
    parser = Parser(prog=f"python -m {program}", description=help)
    parser.add_argument("--model", required=True, help=model)
    parser.add_argument("--out", required=True, type=partial(path_to, "out"), help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that --out already holds")

    def work() -> None:
        options = parser.parse_args(arguments)
        convert(options.model, options.out, overwrite=options.overwrite)
        print(f"written to {options.out}")

    return run_program(work)
