"""The tutorial: stored without outputs; from the installed wheel it runs, and its numbers are those it promises."""

import os
import re
from pathlib import Path

import pytest

from tests.test_wheel import installed, wheel  # noqa: F401 (fixtures)

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_stored_without_outputs():
    import nbformat

    notebook = nbformat.read(TUTORIAL, as_version=4)
    nbformat.validate(notebook)
    assert len(code_cells(notebook)) > 5
    for cell in code_cells(notebook):
        assert (cell.outputs, cell.execution_count, dict(cell.metadata)) == ([], None, {})


@pytest.fixture(scope="module")
def ran(installed):  # noqa: F811
    """What each cell printed and showed, in an empty folder and without the checkout; then where the package lay."""
    import nbformat
    from nbclient import NotebookClient

    folder, elsewhere = installed
    notebook = nbformat.read(TUTORIAL, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("print(neuroal_jax.__file__)"))
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": elsewhere}})
    client.execute(env={**os.environ, "PYTHONPATH": str(folder)})
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert (
        "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stderr") == ""
    )
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    shown = "".join(output.data.get("text/html", "") for output in outputs if output.output_type == "execute_result")
    assert printed.strip().endswith(str(folder / "neuroal_jax" / "__init__.py"))
    return printed, shown


def numbers(printed, pattern):
    """The numbers of the only line of a pattern, where `N` stands for one."""
    (found,) = re.findall(pattern.replace("N", r"(\d+\.\d+)"), printed)
    return list(map(float, (found,) if isinstance(found, str) else found))


@pytest.mark.slow
def test_pruning_costs_and_the_search_is_worth_it(ran):
    printed, shown = ran
    before, pruned = numbers(printed, "PyTorch: dense N, pruned N\n")
    assert numbers(printed, "uniform: token_ppl N\n")[0] > numbers(printed, "neuroal: token_ppl N\n")[0] > 2 * before
    assert numbers(printed, "neuroal: token_ppl N\n")[0] == pytest.approx(pruned, abs=0.02)  # in PyTorch as in JAX
    assert f"{before:.2f} \u2192" in shown
    assert shown.count("<svg") == 3
    stages = re.findall(r"^([a-z: ]+): \d+\.\d s$", printed, re.MULTILINE)
    assert stages[:5] == ["open model", "read texts", "dense perplexity", "search: block step", "search: alignment"]
    assert stages[5:] == ["search: row step", "prune", "pruned perplexity", "write"]


@pytest.mark.slow
def test_training_mends_and_zeros_stay(ran):
    printed, _ = ran
    for where in ("JAX", "PyTorch"):
        pruned, trained = numbers(printed, f"{where}: pruned N, trained on N\n")
        assert trained < 0.9 * pruned
    assert "JAX: pruned weights that are not zero: 0\n" in printed
    assert printed.count("its zeros are exactly the masks") == 3
