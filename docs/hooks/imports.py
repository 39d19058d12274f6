"""Who imports whom in the engine: what a test checks, and what the picture of the house is drawn from."""

import ast
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).parents[2]
ENGINE = sorted(path for path in (ROOT / "neuroal_jax").rglob("*.py") if path.name != "_version.py")  # that is built

# The folders of the engine from low to high, those of one line beside each other; `neuroal_jax` itself has only names.
ORDER = [
    ["neuroal_jax", "errors", "lazy", "registry", "version"],
    ["numerics", "machine"],
    ["files"],
    ["models"],
    ["checkpoint", "data"],
    ["allocation"],
    ["masks"],
    ["pruners", "refine"],
    ["resume"],
    ["walk"],
    ["search"],
    ["command"],
    ["run", "report", "finetune", "demo"],
    ["prune"],
]
# By name without `neuroal_jax.`: the file of every module.
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__").removeprefix("neuroal_jax."): path
    for path in ENGINE
}


class Import(NamedTuple):
    """One module of the engine imports another: at its top, in a function, or for the type checker alone."""

    who: str
    whom: str
    kind: Literal["import", "function", "typing"]


@cache
def engine_imports() -> list[Import]:
    """All imports of one module of the engine by another."""
    found: list[Import] = []

    def visit(module: str, node: ast.AST, kind: Literal["import", "function", "typing"]) -> None:
        names = [name.removeprefix("neuroal_jax.") for name in _named(node)]
        found.extend(Import(module, name, kind) for name in names if name in MODULES and name != module)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            kind = "typing"
        elif isinstance(node, ast.FunctionDef):
            kind = "function"
        for child in ast.iter_child_nodes(node):
            visit(module, child, kind)

    for module, path in MODULES.items():
        visit(module, ast.parse(path.read_text()), "import")
    return found


def _named(node: ast.AST) -> list[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "imports name the whole path"
        members = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name.removeprefix("neuroal_jax.") in MODULES else node.module for name in members]
    return []


def folder(module: str) -> str:
    """The folder of a module, or the module itself where it lies in none."""
    return module.split(".")[0]


def rank(module: str) -> int:
    """The place of a module, or else of its folder, in `ORDER`."""
    return next(place for name in (module, folder(module)) for place, line in enumerate(ORDER) if name in line)
