"""The parts of pages that come from elsewhere in the repository, by the name in `<!-- part: NAME -->`."""

import ast
import re
from collections.abc import Callable
from typing import Any

from docs.hooks import house, programs
from docs.hooks.imports import ROOT

_MARK = re.compile(r"^<!-- part: (\w+)(?: (.+?))? -->$", re.MULTILINE)
# A link of a file at the repository's root: where it leads on the site. Other files are not on it.
_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "develop/add-a-method.md"}
# What is public beside `neuroal_jax.__all__`, in the module that has it.
_MORE = {
    "open_checkpoint": "neuroal_jax.checkpoint",
    "apply_masks": "convert.masks_to_torch",
    "verify": "convert.masks_to_torch",
    "pack": "convert.masks_to_torch",
    "unpack": "convert.masks_to_torch",
}


def fill(text: str, page: str) -> str:
    """A page's Markdown with the parts that it asks for.

    Args:
        text: The Markdown.
        page: The page's path below `docs/`, for the links of a part.

    Raises:
        ValueError: If there is no part of a name, or no such section.
    """

    def part(found: re.Match[str]) -> str:
        name, argument = found[1], found[2]
        if name not in PARTS:
            raise ValueError(f"docs/{page}: there is no part {name!r}, expected one of {', '.join(PARTS)}")
        return PARTS[name](argument, page)

    return _MARK.sub(part, text)


def public_names() -> dict[str, str]:
    """The names of the Python interface, each with the module that it is imported from."""
    tree = ast.parse((ROOT / "neuroal_jax" / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    (listed,) = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return {name: imported[name] for name in ast.literal_eval(listed)} | _MORE


def names_on(page: str) -> list[str]:
    """The public names that a page documents one by one."""
    return re.findall(r"^<!-- part: python (\w+) -->$", (ROOT / "docs" / page).read_text(), re.MULTILINE)


def _python(name: str | None, page: str) -> str:
    """The documentation of one public name; without one, of all that the page does not name elsewhere."""
    places = public_names()
    if name is None:
        others = [other for other in places if other not in names_on(page)]
        return "\n\n".join(_python(other, page) for other in others)
    members = (
        "\n    options:\n      members: false" if name == "PruneConfig" else ""
    )  # its fields have a page of their own
    return f"::: {places[name]}.{name}{members}"


def _section(title: str, page: str) -> str:
    """A section of CONTRIBUTING.md, without its heading."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"docs/{page}: CONTRIBUTING.md has no section {title!r}")
    return linked(found[1].strip(), page)


def _examples(_: str, page: str) -> str:
    """All sections of CONTRIBUTING.md that add something, with their headings."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return linked("".join(re.findall(r"^## Add .*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)).strip(), page)


def _changelog(_: str, page: str) -> str:
    return linked((ROOT / "CHANGELOG.md").read_text().partition("\n")[2].strip(), page)


def linked(text: str, page: str) -> str:
    """A root file's text as it reads on a page: links to files that the site lacks become words."""
    up = "../" * page.count("/")

    def link(found: re.Match[str]) -> str:
        words, file, anchor = found.groups("")
        if file.startswith("docs/"):
            return f"[{words}]({up}{file.removeprefix('docs/')}{anchor})"
        return f"[{words}]({up}{_PAGES[file]}{anchor})" if file in _PAGES else words

    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)", link, text)


PARTS: dict[str, Callable[[Any, str], str]] = {
    "options": lambda _, page: programs.options_page(),
    "programs": lambda _, page: programs.programs_page(),
    "python": _python,
    "house": lambda _, page: house.picture(),
    "section": _section,
    "examples": _examples,
    "changelog": _changelog,
}
