"""The wheel: all of the package and nothing else; installed, without the checkout, it runs every program."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = "1.2.3" if shutil.which("git") else PROJECT["tool"]["setuptools_scm"]["fallback_version"]
SCRIPTS = PROJECT["project"]["scripts"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("neuroal_jax", "convert", "eval"):  # without what an earlier build left in the checkout
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "neuroal_jax" / "_version.py").unlink(missing_ok=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, source)
    if VERSION == "1.2.3":
        for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"], ["tag", "v1.2.3"]):
            who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false"]
            subprocess.run(["git", *who, *command], cwd=source, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds the wheel's content, and an empty one to run in."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel)],
        check=True,
    )
    return folder, tmp_path_factory.mktemp("elsewhere")


def run(installed, *arguments):
    folder, elsewhere = installed
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"neuroal_jax"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {"neuroal_jax": "neuroal_jax", "convert": "neuroal_jax/convert", "eval": "neuroal_jax/eval"}
    expected = {
        f"{place}/{path.relative_to(ROOT / source).as_posix()}"
        for source, place in sources.items()
        for path in (ROOT / source).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info" not in name} == expected | {"neuroal_jax/_version.py"}


def test_its_version_is_the_tag(wheel, installed):
    assert wheel.name == f"neuroal_jax-{VERSION}-py3-none-any.whl"
    code = "import sys, neuroal_jax; print(neuroal_jax.__version__, 'importlib.metadata' in sys.modules)"
    assert run(installed, "-c", code).split() == [VERSION, "False"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_program_tells_its_options(installed, script):
    entry = EntryPoint(script, SCRIPTS[script], "console_scripts")
    printed = run(
        installed,
        "-c",
        f"import sys, neuroal_jax; from {entry.module} import {entry.attr}; print(neuroal_jax.__file__)\n"
        f"sys.argv = ['{script}', '--help']\nsys.exit({entry.attr}())",
    )
    assert printed.startswith(str(installed[0]))
    assert "--help" in printed


def test_the_demo_runs_is_verified_and_reported(installed):
    _, elsewhere = installed
    options = ["--sparsity", "0.7", "--step", "block", "--block-lambdas", "0.1", "--nsamples", "4", "--seqlen", "32"]
    run(
        installed, "-m", "neuroal_jax.prune", "--model", "demo", *options, "--eval", "none", "--out", "out",
        "--save-model", "model",
    )  # fmt: skip
    masks = ["--model", "model", "--masks", "out/masks.safetensors", "--files-only"]
    assert "exactly the masks" in run(installed, "-m", "neuroal_jax.convert.masks_to_torch", "verify", *masks)
    (elsewhere / "out" / "report.html").unlink()
    run(installed, "-m", "neuroal_jax.report", "out")
    assert (elsewhere / "out" / "report.html").stat().st_size > 10**6
