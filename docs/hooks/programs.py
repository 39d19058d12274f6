"""What the programs' command lines take, read from their own parsers: the reference is made of it, and tests ask it."""

import argparse
import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field
from importlib import import_module
from typing import Any
from unittest.mock import patch

from neuroal_jax.command.config import OWN_OPTIONS, all_options
from neuroal_jax.command.values import flag

PRUNE = "neuroal_jax.prune"
# By the module that `python -m` names: the module that has its `main`.
PROGRAMS = {
    PRUNE: PRUNE,
    "neuroal_jax.report": "neuroal_jax.report.page",
    "convert.masks_to_torch": "convert.masks_to_torch",
    "convert.hf_to_flax": "convert.hf_to_flax",
    "convert.to_safetensors": "convert.to_safetensors",
    "eval.perplexity": "eval.perplexity",
    "eval.zero_shot": "eval.zero_shot",
    "eval.generation": "eval.generation",
    "eval.sweep": "eval.sweep",
}
_FLAG = re.compile(r"--[a-z][a-z-]*")
_COLUMNS = 100  # of a help text
_GROUPS = {
    "model": "The model, and where it runs",
    "what to prune": "What to prune",
    "search": "The search",
    "methods": "Options that methods bring",
    "data": "Text",
    "output": "What is written",
}
_AFFECTS = {
    "result": "the result",
    "search": "the result of a search",
    "nothing": "not the result",
}


def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser of a program."""
    found: argparse.ArgumentParser = import_module(PROGRAMS[module]).make_parser()
    return found


def parsers_within(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The parsers of a program's commands, by their names; empty where it has none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """All flags of a program and of its commands."""
    own = {name for action in parser._actions for name in action.option_strings}
    return own.union(*(flags_of(each) for each in parsers_within(parser).values()))


def options_page() -> str:
    """Every option of a run as Markdown: a section for each group, and in it a table."""
    sections: dict[str, list[str]] = {group: [] for group in _GROUPS}
    for option in all_options():
        sections[option.metadata["group"]].append(_row(option))
    head = "| option | default | what it means | changes |\n|---|---|---|---|\n"
    return "\n\n".join(f"### {_GROUPS[group]}\n\n{head}" + "\n".join(rows) for group, rows in sections.items() if rows)


def _row(option: Field[Any]) -> str:
    name, choices, own = flag(option.name), option.metadata["choices"], OWN_OPTIONS.get(option.name)
    words = option.metadata["help"]
    if choices:
        words += "; one of " + ", ".join(f"`{choice}`" for choice in choices)
    if own is not None:
        words += f" (with {flag(own[1])} {own[2]})"
    cells = [f"`{name}`{{ #{name.removeprefix('--')} }}", _default(option), re.sub(_FLAG, r"`\g<0>`", words)]
    return (
        "| " + " | ".join([*(cell.replace("|", "\\|") for cell in cells), _AFFECTS[option.metadata["affects"]]]) + " |"
    )


def _default(option: Field[Any]) -> str:
    default = option.default
    if default is MISSING:
        return "to be given"
    if default is None or default is False:
        return ""
    return f"`{','.join(map(str, default)) if isinstance(default, tuple) else default}`"


def programs_page() -> str:
    """The `--help` of every other program as Markdown."""
    return "\n\n".join(_help(name, parser_of(name)) for name in PROGRAMS if name != PRUNE)


def _help(name: str, parser: argparse.ArgumentParser) -> str:
    with _columns():
        texts = [parser.format_help(), *(each.format_help() for each in parsers_within(parser).values())]
    return f"### {name}\n\n" + "\n\n".join(f"```text\n{text.rstrip()}\n```" for text in texts)


@contextlib.contextmanager
def _columns() -> Iterator[None]:
    """Help texts are as wide on every terminal, and without colours."""
    with patch.dict("os.environ", {"COLUMNS": str(_COLUMNS), "NO_COLOR": "1"}):
        yield
