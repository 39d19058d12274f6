"""What `help` says of every public name: whole, true to the signature, with an example that runs."""

import dataclasses
import doctest
import inspect
import pydoc
import re
import tempfile

import pytest

import neuroal_jax
from neuroal_jax.run import pipeline

NAMES = [*neuroal_jax.__all__, "apply_masks", "verify"]
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):$", re.MULTILINE)


def named(name):
    """A public name; the module that can be called is the function that it calls."""
    if name in ("apply_masks", "verify"):
        from convert import masks_to_torch

        return getattr(masks_to_torch, name)
    return pipeline.prune if name == "prune" else getattr(neuroal_jax, name)


def sections(name):
    """The sections of a docstring by heading."""
    _, *parts = SECTION.split(inspect.getdoc(named(name)))
    return dict(zip(parts[::2], parts[1::2], strict=True))


def entries(text):
    """The names that a section explains."""
    return re.findall(r"^ {4}(\w+): \S", text, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_explained(name):
    found, thing = sections(name), named(name)
    if dataclasses.is_dataclass(thing):
        assert sorted(entries(found["Attributes"])) == sorted(field.name for field in dataclasses.fields(thing))
    else:
        parameters = inspect.signature(thing).parameters
        assert entries(found["Args"]) == list(parameters)
    if not inspect.isclass(thing):
        assert found["Returns"].strip()
        assert entries(found["Raises"])
    assert ">>> " in found["Example"]


def test_help_of_the_module_that_can_be_called_is_the_function_s():
    shown = pydoc.plain(pydoc.render_doc(neuroal_jax.prune))
    for line in ("Prunes a model as `config` says", "Args:", "Raises:", ">>> result = neuroal_jax.prune("):
        assert line in shown


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(named(name)), {}, name, None, 0)
    said = []
    result = doctest.DocTestRunner().run(test, out=said.append)
    assert result.attempted
    assert not result.failed, "".join(said)
