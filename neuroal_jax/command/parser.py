"""The command line and the YAML file, both made from `PruneConfig`'s fields. Imports no JAX: `--help` is quick."""

import argparse
import shlex
import sys
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn

from neuroal_jax.command.config import PruneConfig, all_options
from neuroal_jax.command.values import check_names, flag
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import plain, read_bounded
from neuroal_jax.version import RESULT_PACKAGES, versions

_YAML_BYTES = 2**20  # far more than any list of options


_EXAMPLES = "examples:\n"
_KEPT = "\xa0"  # a space at which no line ends
# 78 columns, as all of the help in a terminal of 80, less what is before and after a line.
_LINES = textwrap.TextWrapper(74, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


class _Help(argparse.HelpFormatter):
    """argparse's, but that the lines of examples stay."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLES) else super()._fill_text(text, width, indent)


class _Versions(argparse.Action):
    """Prints what a report of a problem needs, and leaves; imports no package for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import platform

        found = {**versions((*RESULT_PACKAGES, "torch")), "platform": platform.platform()}
        print("\n".join(f"{name} {value}" for name, value in found.items()))
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A program's command line; reports problems as UserError, so that they end in one line like all others.

    Every program tells its versions, and examples. One that was started by its installed name goes by that name.

    Args:
        prog: How the program is started: `python -m MODULE`.
        examples: What may follow `prog` on the command line, as typed in a shell.
        options: As argparse has them.
    """

    def __init__(self, prog: str, *, examples: Sequence[str] = (), **options: Any) -> None:
        command = Path(sys.argv[0]).name
        if prog.startswith("python -m ") and command.startswith("neuroal-"):
            prog = command
        options = {"formatter_class": _Help, "allow_abbrev": False, **options}
        super().__init__(prog, epilog=_epilog(prog, examples) if examples else None, **options)
        nothing = argparse.SUPPRESS  # sets no option
        text = "show the versions of this program and of what results depend on"
        self.add_argument("--version", action=_Versions, nargs=0, dest=nothing, default=nothing, help=text)

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing usage and leaving."""
        raise UserError(f"{message} (see --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        """As argparse's, which takes it for no matter that nobody reads the message or the disk is full."""
        if message:
            (file or sys.stderr).write(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which makes an empty list of the value in `--flag=--`: that is refused."""
        given = sys.argv[1:] if args is None else args
        for name, _, value in (argument.partition("=") for argument in given):
            if name.startswith("--") and value == "--":
                self.error(f"argument {name}: expected one argument, found '--'")
        return super().parse_known_args(args, namespace)


def _epilog(prog: str, examples: Sequence[str]) -> str:
    """Commands for a shell, a long one on several lines, which begin with options."""
    commands = []
    for example in examples:
        command = shlex.join(shlex.split(f"{prog} {example}"))
        breakable = command.replace(" ", _KEPT).replace(f"{_KEPT}--", " --")
        commands.append("  " + " \\\n  ".join(_LINES.wrap(breakable)).replace(_KEPT, " "))
    return _EXAMPLES + "\n".join(commands)


def parse_arguments(arguments: Sequence[str] | None = None) -> PruneConfig:
    """The config that the command line and its `--config` file describe; flags win over the file.

    Raises:
        UserError: If an option or its value is unknown.
    """
    given = vars(make_parser().parse_args(arguments))
    file = given.pop("config")
    known = [option.name for option in all_options()]
    values = given if file is None else {**read_yaml(Path(file), known), **given}
    if "model" not in values:
        raise UserError("--model is missing: name a checkpoint directory, a Hub model id or demo (see --help)")
    return PruneConfig(**values)


def make_parser() -> Parser:
    """The command line of `neuroal_jax.prune`."""
    parser = Parser(
        "python -m neuroal_jax.prune",
        examples=(
            "--model demo --sparsity 0.7 --out run",
            "--model meta-llama/Llama-2-7b-hf --sparsity 0.7 --device-memory 80GiB --dry-run",
        ),
        description="Prune a language model without re-training: NeuroAL on top of a pruner.",
        argument_default=argparse.SUPPRESS,  # what is not given is not set, so that --config can set it
    )
    add_options(parser)
    parser.add_argument("--config", default=None, metavar="FILE", help="YAML file of these options; flags win over it")
    return parser


def add_options(parser: Parser, leave_out: Collection[str] = ()) -> None:
    """Adds a flag for every option of a run, but those named in `leave_out`."""
    groups: dict[str, Any] = {}
    for option in all_options():
        if option.name in leave_out:
            continue
        title = option.metadata["group"]
        group = groups[title] if title in groups else parser.add_argument_group(title)
        groups[title] = group
        text = option.metadata["help"]
        if isinstance(option.default, bool):
            group.add_argument(flag(option.name), action="store_true", help=text)
            continue
        choices = option.metadata["choices"]
        if choices:
            text += f": {', '.join(choices)}"
        if option.default is not None and option.default is not MISSING:
            several = isinstance(option.default, tuple)
            text += f" (default: {','.join(map(str, option.default)) if several else option.default})"
        group.add_argument(flag(option.name), metavar=_metavar(option.name, choices), help=text.replace("%", "%%"))


def _metavar(name: str, choices: tuple[str, ...] | None) -> str:
    last = name.split("_")[-1].upper()
    return "NAME" if choices else {"out": "DIR", "save_model": "DIR"}.get(name, last)


def read_yaml(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The options of a `--config` file, names with underscores.

    Raises:
        UserError: If it cannot be read, or names an option that is not `known`.
    """
    try:
        content = plain(_plain_yaml(read_bounded(path, _YAML_BYTES).decode()))
    except Exception as error:  # PyYAML raises KeyError and others for scalars that are not of their tag
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} cannot be read ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds a {type(content).__name__}, expected options as 'name: value' lines")
    return check_names(content, known, f"--config {path}")


_BASE_60 = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}


def _plain_yaml(text: str) -> Any:
    """The value of a YAML text without anchors, which a few lines could make a terabyte of, and without double keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("anchors are not supported")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            found = super().construct_mapping(node, deep)
            if len(found) < len(node.value):
                raise ValueError("a key appears twice")
            return found

        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            of_colons = kind is yaml.ScalarNode and implicit[0] and ":" in value
            tag = super().resolve(kind, value, implicit)
            # YAML 1.1 takes 2:4 for a number of base 60; here it is what it is on the command line.
            return "tag:yaml.org,2002:str" if of_colons and tag in _BASE_60 else tag

    return yaml.load(text, Loader)  # noqa: S506 (a SafeLoader)
