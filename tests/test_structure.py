"""Rules of the house: who may import whom, what a wheel holds, which files a new part touches."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from docs.hooks.imports import ENGINE, MODULES, engine_imports, rank

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted([*(ROOT / "convert").glob("*.py"), *(ROOT / "eval").glob("*.py")])


def imported(path):
    """Top-level names that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_engine_imports_neither_torch_nor_the_programs(path):
    forbidden = {"torch", "convert", "eval", "neuroal_jax.convert", "neuroal_jax.eval"}
    assert not imported(path) & forbidden


UNSAFE_UNLESS = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True}


def unsafe_arguments(source):
    """Arguments, by keyword or in a dict, by which a library would run code of a file's author.

    Ruff sees the functions that always do.
    """
    arguments = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword):
            arguments.append((node.arg, node.value))
        elif isinstance(node, ast.Dict):
            arguments += [
                (getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)
            ]
    return [
        name
        for name, value in arguments
        if name in UNSAFE_UNLESS and getattr(value, "value", None) is not UNSAFE_UNLESS[name]
    ]


@pytest.mark.parametrize("path", [*ENGINE, *PROGRAMS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_library_is_told_to_unpickle_or_to_trust_remote_code(path):
    assert unsafe_arguments(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "unsafe"),
    [
        ("a(trust_remote_code = 1)", ["trust_remote_code"]),
        ("a(\n  allow_pickle=x,\n)", ["allow_pickle"]),
        ("a(weights_only=False)", ["weights_only"]),
        ("a(**{'x': 1, 'trust_remote_code': True})", ["trust_remote_code"]),
        ("a(allow_pickle=False, weights_only=True, **{'trust_remote_code': False, **b})", []),
    ],
)
def test_unsafe_arguments_are_seen_however_they_are_written(source, unsafe):
    assert unsafe_arguments(source) == unsafe


@pytest.mark.parametrize("module", ["convert.masks_to_torch", "neuroal_jax.masks", "neuroal_jax.prune", "neuroal_jax"])
def test_these_modules_import_no_jax(module):
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_prune_is_a_module_and_a_function():
    code = (
        "import neuroal_jax, neuroal_jax.prune\n"
        "assert callable(neuroal_jax.prune) and neuroal_jax.prune.main\n"
        "assert set(neuroal_jax.__all__) <= {name for name in neuroal_jax.__all__ if getattr(neuroal_jax, name)}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_methods_and_families_are_one_file_and_one_registry_line():
    from neuroal_jax.allocation import ALLOCATIONS
    from neuroal_jax.data.texts import TEXTS
    from neuroal_jax.masks.patterns import PATTERNS
    from neuroal_jax.models import FAMILIES
    from neuroal_jax.pruners import PRUNERS
    from neuroal_jax.refine import REFINEMENTS
    from neuroal_jax.search.objective import OBJECTIVES

    folders = {"pruners": PRUNERS, "refine": REFINEMENTS, "masks/patterns": PATTERNS, "data/texts": TEXTS}
    for folder, registry in folders.items():
        assert {path.stem for path in (ROOT / "neuroal_jax" / folder).glob("*.py")} == {"__init__", *registry}
    for registry in (PRUNERS, REFINEMENTS, PATTERNS, ALLOCATIONS, OBJECTIVES):
        for name in registry:
            assert Path(registry.module(name).__file__).is_relative_to(ROOT / "neuroal_jax"), name
    for module in FAMILIES.values():
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


UPWARD = {(f"allocation.{name}", "pruners.wanda") for name in ("owl", "dlp")}  # they look at Wanda's scores


def test_no_modules_import_each_other_in_a_circle():
    after = {module: set() for module in MODULES}
    for who, whom, kind in engine_imports():
        if kind == "import":  # which imports the packages that hold it, too
            packages = {".".join(whom.split(".")[:end]) for end in range(1, whom.count(".") + 1)}
            after[who] |= {whom} | {package for package in packages if not f"{who}.".startswith(f"{package}.")}
    while leaves := {module for module in after if not after[module] & after.keys()}:
        after = {module: others for module, others in after.items() if module not in leaves}
    assert sorted(after) == []


@pytest.mark.parametrize(("kind", "allowed"), [("import", UPWARD), ("function", set()), ("typing", set())])
def test_imports_run_one_way(kind, allowed):
    imports = {(who, whom) for who, whom, found in engine_imports() if found == kind}
    assert len(imports) > 2
    assert {(who, whom) for who, whom in imports if rank(who) < rank(whom) and who != "neuroal_jax"} == allowed


def test_demo_is_small():
    files = [path for path in (ROOT / "neuroal_jax" / "demo").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 2 * 10**6
