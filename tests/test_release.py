"""What a release is made with: its version, the check before it, workflows, templates, hooks, the citation."""

import importlib.util
import json
import re
import runpy
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from neuroal_jax.errors import UserError

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")


def script(name):
    """A script of `.ci` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release_check, tidy = script("release_check"), script("tidy")


def read(path):
    """A YAML file with every scalar as written: 3.10 is no number, and `on` is not true."""
    return yaml.load(path.read_text(), yaml.BaseLoader)


# The version.


def test_a_checkout_that_was_never_installed_has_a_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "neuroal_jax._version", None)
    found = runpy.run_path(str(ROOT / "neuroal_jax" / "version.py"))
    assert found["__version__"] == PYPROJECT["tool"]["setuptools_scm"]["fallback_version"]
    assert found["versions"](["numpy", "no-such-package"]).keys() == {
        "neuroal_jax",
        "python",
        "numpy",
        "no-such-package",
    }
    assert found["versions"](["no-such-package"])["no-such-package"] == "not installed"


CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-12-01\n\n## [0.1.0]\n"


@pytest.mark.parametrize(
    ("version", "tags", "told"),
    [("0.2.0", ["v0.2.0"], "release 0.2.0"), ("0.2.0", ["v0.2.0", "verified"], "release 0.2.0"),
     ("0.1.dev7+gabc", [], "version 0.1.dev7+gabc is no release")],
)  # fmt: skip
def test_a_commit_is_the_release_that_its_tag_says(version, tags, told):
    assert told in release_check.release_of(version, tags, CHANGELOG)


@pytest.mark.parametrize(
    ("version", "tags", "told"),
    [
        ("0.2.1.dev0+d20261201", ["v0.2.0"], "commit is v0.2.0 but builds version 0.2.1.dev0"),
        ("0.2.0", ["v0.1.0", "v0.2.0"], "one tag"),
        ("0.3.0", ["v0.3.0"], r"no section '## \[0.3.0\]'"),
        ("0.2", ["v0.2"], r"no section '## \[0.2\]'"),
    ],
)
def test_a_release_that_is_not_whole_is_refused(version, tags, told):
    with pytest.raises(UserError, match=told):
        release_check.release_of(version, tags, CHANGELOG)


# What was built.


def test_an_sdist_holds_what_git_does(tmp_path):
    top = tmp_path / "neuroal_jax-1"
    for name in (
        "PKG-INFO",
        "LICENSE",
        "neuroal_jax/_version.py",
        "neuroal_jax.egg-info/SOURCES.txt",
        "tests/PKG-INFO",
    ):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    with tarfile.open(tmp_path / "sdist.tar.gz", "w:gz") as archive:
        archive.add(top, top.name)
    found = release_check.files_of_sdist(tmp_path / "sdist.tar.gz")
    assert sorted(found) == ["LICENSE", "tests/PKG-INFO"]
    release_check.same_names(found, found)
    with pytest.raises(UserError, match=r"lacks README\.md, which git has"):
        release_check.same_names(found, [*found, "README.md"])
    with pytest.raises(UserError, match="holds tests/PKG-INFO, which git does not have"):
        release_check.same_names(found, ["LICENSE"])


def test_wheels_are_compared_by_name_and_content():
    release_check.same_wheels({"a": 1, "b": 2}, {"b": 2, "a": 1})
    with pytest.raises(UserError, match="differ in a; c"):
        release_check.same_wheels({"a": 1, "b": 2}, {"a": 3, "b": 2, "c": 4})


def test_a_program_that_fails_is_told_in_one_line():
    code = "import sys; print('a traceback', file=sys.stderr); sys.exit('what was wrong')"
    with pytest.raises(UserError, match=r"ended with 1: what was wrong$"):
        release_check.run(sys.executable, "-c", code)
    assert release_check.run(sys.executable, "-c", "print(1)") == "1\n"


def test_interpreters_are_found_that_can_make_environments():
    this = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert release_check.interpreter(this) == sys.executable
    assert release_check.interpreter("2.0") is None


# The same versions everywhere.


def minors(specifiers, major):
    """The versions MAJOR.N that specifiers allow."""
    return [f"{major}.{minor}" for minor in range(40) if f"{major}.{minor}" in SpecifierSet(specifiers)]


def test_pythons_and_jaxes_are_those_of_the_package():
    pythons = minors(PYPROJECT["project"]["requires-python"], 3)
    assert release_check.supported() == pythons
    (jax,) = [name for name in PYPROJECT["project"]["dependencies"] if re.match(r"jax[<>=]", name)]
    jobs = read(ROOT / ".github" / "workflows" / "test.yml")["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    assert matrix["python"] == pythons
    assert matrix["jax"] == minors(jax.removeprefix("jax"), 0)
    release = read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]["check"]["steps"]
    (versions,) = [step["with"]["python-version"] for step in release if "setup-python" in step.get("uses", "")]
    assert sorted(versions.split()) == pythons


# Workflows.


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_switched_on_by_a_variable_and_may_do_little(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow.keys() >= {"name", "on", "concurrency", "jobs"}
    for name, job in workflow["jobs"].items():
        switched = job if "needs" not in job else workflow["jobs"][job["needs"]]
        (variable,) = set(re.findall(r"vars\.(\w+) == 'true'", switched["if"]))
        assert f"set {variable} to true" in " ".join(path.read_text().replace("#", "").split())
        assert int(job["timeout-minutes"]) <= 360 and "runs-on" in job
        assert job.get("permissions", {}).keys() <= ({"id-token", "pages"} if name == "publish" else set())
        assert "if" not in job or not re.search(r"always\(\)|failure\(\)|cancelled\(\)", job["if"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_calls_is_there(path):
    targets = set(re.findall(r"^([\w./-]+|\$\(DEV\)/\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {target.replace("$(DEV)", ".venv") for target in targets}
    steps = [step for job in read(path)["jobs"].values() for step in job["steps"]]
    called = [step["run"].split()[1] for step in steps if step.get("run", "").startswith("make ")]
    assert set(called) <= targets
    assert all("run" in step or re.search(r"@(release/)?v\d+$", step["uses"]) for step in steps)
    for step in steps:
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] == "false"
        assert "${{" not in step.get("run", "")  # values come by environment variables, which no shell expands twice


def test_workflows_are_these():
    assert [path.name for path in WORKFLOWS] == ["docs.yml", "release.yml", "test.yml"]
    release = read(ROOT / ".github" / "workflows" / "release.yml")
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert release["jobs"]["publish"]["environment"] == "pypi"
    assert any(step.get("run") == "make release-check" for step in release["jobs"]["check"]["steps"])


# Templates, hooks, citation.


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_is_whole_and_asks_for_the_manifest(path):
    form = read(path)
    assert {"name", "description", "body"} <= form.keys() <= {"name", "description", "labels", "body", "title"}
    questions = [item for item in form["body"] if item["type"] != "markdown"]
    assert {item["type"] for item in questions} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert len({item["id"] for item in questions}) == len({item["attributes"]["label"] for item in questions})
    assert len(questions) == len({item["id"] for item in questions})
    text = path.read_text()
    assert "manifest.json" in text
    if path.stem != "feature":
        assert "python -m neuroal_jax.prune --version" in text
        assert {"command", "output", "versions", "manifest"} <= {item["id"] for item in questions}


def test_issue_forms_are_these():
    assert [path.stem for path in FORMS] == ["bug", "feature", "wrong_numbers"]
    assert read(ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml") == {"blank_issues_enabled": "false"}


def test_hooks_run_tools_that_are_there():
    clientlib = pytest.importorskip("pre_commit.clientlib")
    hooks = [
        hook for repo in clientlib.load_config(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
    ]
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "mypy", "texts"}
    development = " ".join(PYPROJECT["project"]["optional-dependencies"]["dev"])
    for hook in hooks:
        program, *rest = hook["entry"].split()
        assert program == ".venv/bin/python" or Path(program).name in development
        assert all((ROOT / word).exists() for word in rest if word.startswith(".ci/"))


NOTEBOOK = {
    "cells": [
        {"cell_type": "markdown", "metadata": {}, "source": ["Ä  \n"]},
        {"cell_type": "code", "metadata": {}, "source": ["1"], "execution_count": 3, "outputs": [{"data": "1"}]},
    ]
}


def test_files_are_tidied_before_a_commit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {
        "a.md": b"a  \nb\t\n",
        "a.bin": b"a \n",
        "tests/data/a.txt": b"a \n",
        "a.ipynb": json.dumps(NOTEBOOK).encode(),
        "large.md": b"a" * (tidy.LARGEST + 1),
    }
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    assert tidy.main([*files]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "a.md was tidied: add it again",
        "a.ipynb was tidied: add it again",
        f"large.md has {tidy.LARGEST + 1} bytes, expected at most {tidy.LARGEST}: keep it elsewhere",
    ]
    assert Path("a.md").read_bytes() == b"a\nb\n"
    assert Path("a.bin").read_bytes() == Path("tests/data/a.txt").read_bytes() == b"a \n"
    text, code = json.loads(Path("a.ipynb").read_text())["cells"]
    assert text == NOTEBOOK["cells"][0]
    assert (code["source"], code["outputs"], code["execution_count"]) == (["1"], [], None)
    assert tidy.main(["a.md", "a.bin", "tests/data/a.txt", "a.ipynb"]) == 0


def test_the_citation_names_the_software_and_the_paper():
    citation = read(ROOT / "CITATION.cff")
    assert citation.keys() >= {"cff-version", "message", "title", "authors", "license", "preferred-citation"}
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert citation["license"] == PYPROJECT["project"]["license"]
    paper = citation["preferred-citation"]
    assert paper.keys() >= {"type", "title", "authors", "journal", "year"}
    assert [author["family-names"] for author in paper["authors"]] == ["Cunegatti", "Custode", "Iacca"]
    assert paper["title"] == "Zeroth-Order Adaptive Neuron Alignment Based Pruning without Re-Training"
