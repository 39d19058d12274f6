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


def conversion_parser(program: str, help: str, model: str, examples: Sequence[str]) -> Parser:
    """The command line of such a program.

    Args:
        program: The module's name.
        help: What the program does.
        model: What `--model` takes.
        examples: What may follow on the command line.
    """
    parser = Parser(f"python -m {program}", description=help, examples=examples)
    parser.add_argument("--model", required=True, help=model)
    parser.add_argument("--out", required=True, type=partial(path_to, "out"), help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that --out already holds")
    return parser


def run_conversion(convert: Conversion, parser: Parser, arguments: Sequence[str] | None) -> int:
    """Runs a command line (None: the process's); returns the exit code."""

    def work() -> None:
        options = parser.parse_args(arguments)
        convert(options.model, options.out, overwrite=options.overwrite)
        print(f"written to {options.out}")

    return run_program(work)
