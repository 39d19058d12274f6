"""Every command in README.md and docs/: its flags are the program's, and unless it says what it needs, it runs."""

import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs.hooks.programs import PROGRAMS, flags_of, parser_of
from neuroal_jax.command import process
from neuroal_jax.command.config import PruneConfig
from neuroal_jax.errors import UserError
from tests.docs.pages import PAGES, ROOT, blocks, command_lines, name, prose, simple_commands

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = {script: getattr(process, place.partition(":")[2]).args[0] for script, place in PROJECT["scripts"].items()}
MODULES = {"pip", "venv", "http.server"}
SHELL = {"cat", "cd", "cp", "echo", "export", "git", "head", "ls", "mkdir", "rm", "source", "tar", "test", "."}
BENCHMARKS = {
    f"benchmarks.{path.stem}": {*re.findall(r'"(--[a-z][\w-]*)"', path.read_text())}
    for path in (ROOT / "benchmarks").glob("*.py")
}  # by module: its flags, read without the libraries that it measures
OTHER_FLAGS = {
    "--no-deps",
    "--ntasks-per-node",
    "--strict",
    "--no-index",
    "--find-links",
}  # of programs that are not ours
INSTALLS = {"pip", "make", "git", "source", "."}  # what other tests do, or what changes this checkout
COMMANDS = [
    pytest.param(block, words, id=f"{block.page}:{block.line}")
    for page in PAGES
    for block in blocks(page)
    for line in command_lines(block)
    for words in simple_commands(line)
]


@cache
def parser(module):
    return parser_of(module)


def check(words):
    """Raises UserError or AssertionError for a command that cannot work, whatever there is on the disk."""
    program, *arguments = words
    if program in SCRIPTS:
        check_module(SCRIPTS[program], arguments)
    elif program in ("python", "python3"):
        check_python(*arguments)
    elif program == "make":
        assert {word for word in arguments if "=" not in word} <= targets()
    elif program == "pip":
        check_pip(arguments)
    else:
        assert program in SHELL, f"{program} is no known command"


def check_python(option, *arguments):
    if option == "-c":
        compile(arguments[0], "-c", "exec")
    elif option == "-m":
        check_module(arguments[0], arguments[1:])
    else:
        assert (ROOT / option).is_file(), f"{option} is no file"


def check_module(module, arguments):
    if module == "pip":
        check_pip(arguments)
    elif module not in MODULES:
        check_arguments(re.sub(r"^neuroal_jax\.(convert|eval)\.", r"\1.", module), arguments)


def targets():
    return {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}


def check_pip(arguments):
    extras = {extra for found in re.findall(r"\[([\w,-]+)\]", " ".join(arguments)) for extra in found.split(",")}
    assert extras <= {*PROJECT["optional-dependencies"]}


def check_arguments(module, arguments):
    if module in BENCHMARKS:
        assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= BENCHMARKS[module]
        return
    assert module in PROGRAMS, f"{module} is no program of this project"
    if "--help" in arguments:
        return
    values = vars(parser(module).parse_args(list(arguments)))
    if module == "neuroal_jax.prune" and values.pop("config") is None:
        if str(values.get("allocation", "")).endswith(".json"):  # a file, which may not be there
            values = {"sparsity": 0.5, **values, "allocation": "uniform"}
        PruneConfig(**values)


@pytest.mark.parametrize(("block", "words"), COMMANDS)
def test_a_command_has_the_flags_of_its_program(block, words):
    check(words)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("python -m neuroal_jax.prune --model demo --sparsity 0.7 --dry-run", None),
        ("python -m neuroal_jax.prune --model demo --sparsety 0.7 --dry-run", UserError),
        ("python -m neuroal_jax.prune --model demo --sparsity 7 --dry-run", UserError),
        ("HF_HUB_OFFLINE=1 neuroal-masks verify --model demo --masks m && neuroal-masks pack --bogus", UserError),
        ("python -m neuroal_jax.convert.masks_to_torch unpack --model x --out y", UserError),
        ("python -m neuroal_jax.convert.masks_to_torch unpack --packed x --out y > log # --bogus", None),
        ("python -m eval.nothing", AssertionError),
        ("make demo nothing", AssertionError),
        ("pip install -e '.[cuda12,evil]'", AssertionError),
        ("frobnicate", AssertionError),
    ],
)
def test_a_command_that_cannot_work_is_seen(line, wrong):
    if wrong is None:
        [check(words) for words in simple_commands(line)]
    else:
        with pytest.raises(wrong):
            [check(words) for words in simple_commands(line)]


@cache
def known_flags():
    found = set().union(*(flags_of(parser(module)) for module in PROGRAMS), *BENCHMARKS.values())
    return found | OTHER_FLAGS


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_flag_in_the_text_exists(page):
    assert {*re.findall(r"(?<![\w-])--[a-z][\w-]*", prose(page.read_text()))} <= known_flags()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_program_and_target_in_the_text_exists(page):
    text = prose(page.read_text())
    modules = {
        re.sub(r"^neuroal_jax\.(convert|eval)\.", r"\1.", found) for found in re.findall(r"`python -m ([\w.]+)", text)
    }
    assert modules <= {*PROGRAMS, *BENCHMARKS, *MODULES}
    assert {*re.findall(r"`make ([\w-]+)", text)} <= targets()
    assert {*re.findall(r"`(neuroal-[a-z-]+) ", text)} <= {*SCRIPTS}


@pytest.mark.parametrize("module", PROGRAMS)
def test_a_program_s_module_exists_and_has_flags(module):
    assert find_spec(module) and "--help" in flags_of(parser(module))


def runnable(page):
    """What a test runs of a page, in order: each its language, line and code. Lines that install are left out."""
    found = []
    for block in blocks(page):
        if block.needs is None and block.language == "python":
            found.append(("python", block.line, block.text))
        lines = [line for line in command_lines(block) if not installs(line)]
        if block.needs is None and lines:
            found.append(("sh", block.line, "\n".join(lines)))
    return found


def installs(line):
    return any(
        words[0] in INSTALLS or words[1:3] in (["-m", "pip"], ["-m", "venv"])
        for words in simple_commands(line)
        if words
    )


RUNNABLE = {name(page): runnable(page) for page in PAGES if runnable(page)}


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What went wrong, by page, when the commands of all pages were run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_pages.py"))],
        input=json.dumps(RUNNABLE),
        cwd=tmp_path_factory.mktemp("pages"),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE)
def test_a_page_s_commands_run_one_after_the_other(page, failures):
    assert page not in failures, failures[page]
