"""The command line and the YAML file, both made from `PruneConfig`'s fields. Imports no JAX: `--help` is quick."""

import argparse
import sys
from collections.abc import Collection, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn

from neuroal_jax.command.config import PruneConfig, all_options
from neuroal_jax.command.values import check_names, flag
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import plain, read_bounded

_YAML_BYTES = 2**20  # far more than any list of options


class Parser(argparse.ArgumentParser):
    """Reports problems as UserError, so that they end in one line like all others."""

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


def parse_arguments(arguments: Sequence[str] | None = None) -> PruneConfig:
    """The config that the command line and its `--config` file describe; flags win over the file.

    Raises:
        UserError: If an option or its value is unknown.
    """
    given = vars(_parser().parse_args(arguments))
    file = given.pop("config")
    known = [option.name for option in all_options()]
    values = given if file is None else {**read_yaml(Path(file), known), **given}
    if "model" not in values:
        raise UserError("--model is missing: name a checkpoint directory, a Hub model id or demo (see --help)")
    return PruneConfig(**values)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m neuroal_jax.prune",
        description="Prune a language model without re-training: NeuroAL on top of a pruner.",
        argument_default=argparse.SUPPRESS,  # what is not given is not set, so that --config can set it
        allow_abbrev=False,
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
    return "NAME" if choices else {"out": "DIR", "save_model": "DIR"}.get(name, name.upper())


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
