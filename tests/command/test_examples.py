"""`--help` shows two commands for every program that its parser takes, and `--version` what results depend on."""

import re
import shlex
import subprocess
import sys
import tomllib
from argparse import _SubParsersAction
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from neuroal_jax.command import process
from neuroal_jax.command.parser import Parser

ROOT = Path(__file__).parents[2]
# By module that makes the parser: how the program is started.
PROGRAMS = {
    "neuroal_jax.command.parser": "neuroal_jax.prune",
    "neuroal_jax.report.page": "neuroal_jax.report",
    **{
        name: name
        for folder in ("convert", "eval", "benchmarks")
        for name in sorted(
            f"{folder}.{path.stem}"
            for path in (ROOT / folder).glob("*.py")
            if re.search(r"^def main\(", path.read_text(), re.MULTILINE) and path.stem != "parity"  # it has no option
        )
    },
}


def parsers(module):
    """A program's parser and those of its commands, each with what reads its command line."""
    program = import_module(module)
    parser = program.make_parser()
    yield parser, getattr(program, "parse_arguments", parser.parse_args)
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            yield from ((command, command.parse_args) for command in action.choices.values())


def examples(parser):
    """The commands at the end of the help, as a shell takes them."""
    _, _, shown = parser.format_help().partition("\nexamples:\n")
    return [shlex.split(line) for line in shown.replace("\\\n", "").splitlines()]


@pytest.mark.parametrize("module", PROGRAMS)
def test_help_ends_with_two_examples_that_its_parser_takes(module, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for parser, parse in parsers(module):
        assert parser.prog.startswith(f"python -m {PROGRAMS[module]}")
        prefix = parser.prog.split()
        found = examples(parser)
        assert len(found) == 2
        for command in found:
            assert command[: len(prefix)] == prefix
            parse(command[len(prefix) :])
        assert max(map(len, parser.format_help().splitlines())) <= 80


def test_installed_programs_are_among_them():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    modules = [getattr(process, entry.partition(":")[2]).args[0] for entry in scripts.values()]
    assert len(modules) == 8
    assert {re.sub(r"^neuroal_jax\.(convert|eval)\.", r"\1.", module) for module in modules} <= {*PROGRAMS.values()}


def test_a_long_example_is_one_command_on_lines_of_80_columns():
    long = ["--name", "two words", *(word for number in range(20) for word in (f"--option-{number}", "value-of-it"))]
    parser = Parser("python -m program", examples=[shlex.join(long), "--short"])
    assert examples(parser) == [["python", "-m", "program", *long], ["python", "-m", "program", "--short"]]
    lines = parser.format_help().splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line.lstrip().startswith(("--option", "python")) for line in lines[lines.index("examples:") + 1 :])


def test_an_installed_program_goes_by_its_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/neuroal-masks", "--help"])
    program = import_module("convert.masks_to_torch").make_parser()
    assert program.prog == "neuroal-masks"
    assert examples(program)[0][:2] == ["neuroal-masks", "apply"]


def test_the_version_is_told_without_jax():
    code = (
        "import sys\nfrom neuroal_jax.prune import main\n"
        "try:\n    main(['--version'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'jax', 'torch', 'transformers'} & sys.modules.keys()\n"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = dict(line.split(" ", 1) for line in told.splitlines())
    assert found["jax"] == version("jax") and found["python"] == sys.version.split()[0]
    assert {"neuroal_jax", "torch", "platform"} < found.keys()
