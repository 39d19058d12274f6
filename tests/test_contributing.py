"""CONTRIBUTING's examples: each is written into a copy of the package, as a stranger would, and run."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import RUN, save_random_model

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r'```python title="([^"]+)"\n(.*?)```', (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)

# One run of each addition: what is asked for, and what its manifest must say.
RUNS = {
    "pruner": {"pruner": "ria", "allocation": "uniform"},
    "updating pruner": {"pruner": "rescaled", "rescaled_share": "0.5", "allocation": "owl"},
    "allocation": {"allocation": "flow", "flow_lambda": "0.1"},
    "refinement": {"pruner": "magnitude", "refine": "rerank", "allocation": "uniform"},
    "objective": {"objective": "drift", "step": "block"},
    "text": {"model": "demo", "calib": "wikitext103=TEXT", "eval": "wikitext103=TEXT", "nsamples": 4, "seqlen": 32},
    "family": {"allocation": "uniform"},
}


def add_line(file, registry, line):
    """Inserts a registry's new entry before the brace that closes its dictionary."""
    text = file.read_text()
    (value,) = [
        node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and registry == ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
    ]
    end = max(node.end_lineno for node in ast.walk(value) if isinstance(node, ast.Dict))
    lines = text.splitlines(keepends=True)
    file.write_text("".join([*lines[: end - 1], line, *lines[end - 1 :]]))


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the package with all examples in it."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "neuroal_jax", root / "neuroal_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for title, code in EXAMPLES:
        file, _, registry = title.partition(": ")
        if registry:
            add_line(root / file, registry, code)
        else:
            assert not (root / file).exists()
            (root / file).write_text(code)
    return root


def python(extended, code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(extended), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=extended, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_addition_is_one_file_and_one_line():
    files = [title for title, _ in EXAMPLES if ": " not in title]
    lines = [title for title, _ in EXAMPLES if ": " in title]
    assert len(files) == len(lines) == len(RUNS)
    registries = {"neuroal_jax/numerics": "neuroal_jax/search"}  # where it is not beside the code
    folders = [str(Path(file).parent) for file in files]
    assert [registries.get(name, name) for name in folders] == [str(Path(line.split(": ")[0]).parent) for line in lines]


@pytest.fixture(scope="module")
def manifests(extended, llama, tokens, tmp_path_factory):
    """The manifest of every run, computed with the copy."""
    root = tmp_path_factory.mktemp("runs")
    family = save_random_model(
        root / "seed_oss", family="seed_oss", head_dim=8, attention_dropout=0, residual_dropout=0
    )
    text, runs = root / "articles.txt", {}
    text.write_text(" = Title = \n\n" + " A sentence of the article . \n" * 100)
    for name, options in RUNS.items():
        model = family if name == "family" else llama
        given = {"model": str(model), "calib": str(tokens), "eval": str(tokens), "out": str(root / name), **RUN}
        options = {
            key: value.replace("TEXT", str(text)) if isinstance(value, str) else value for key, value in options.items()
        }
        runs[name] = {**given, **options}
    code = (
        "import json, sys, neuroal_jax\n"
        "for name, options in json.loads(sys.argv[1]).items():\n"
        "    neuroal_jax.prune(neuroal_jax.PruneConfig(**options))\n"
    )
    python(extended, code, json.dumps(runs))
    return {name: json.loads((root / name / "manifest.json").read_text()) for name in RUNS}, root


@pytest.mark.parametrize("name", RUNS)
def test_its_run_keeps_the_budget(manifests, name):
    sparsity = manifests[0][name]["sparsity"]
    assert sparsity["zeros"] == round(0.6 * sparsity["prunable"])


def test_an_updating_pruner_saves_its_model(manifests):
    from neuroal_jax.checkpoint.safetensors import SafetensorsSource
    from neuroal_jax.masks import check_pruned, read_masks

    out = manifests[1] / "updating pruner"
    masks = read_masks(out / "masks.safetensors")
    assert masks.updated_weights
    check_pruned(masks, SafetensorsSource(out / "model"), "the saved model")


def test_a_text_is_read_by_its_rules(manifests):
    data = manifests[0]["text"]["data"]
    assert data["calib"]["origin"].startswith("wikitext103=")
    assert data["calib"]["windows"] == 4
    assert list(manifests[0]["text"]["token_ppl"]["texts"]) == ["wikitext103"]


def test_an_allocation_s_measurement_is_recorded_and_drawn(manifests):
    found = manifests[0]["allocation"]
    assert len(found["measured"]["flow"]) == 3
    assert "flow" in (manifests[1] / "allocation" / "report.html").read_text()
    given = json.loads((manifests[1] / "allocation" / "allocation.json").read_text())
    assert len({str(value) for value in given["sparsity"].values()}) == 3


def test_a_refinement_gives_what_its_scores_give(manifests, llama, tokens, tmp_path):
    from neuroal_jax import PruneConfig, prune
    from neuroal_jax.masks import read_masks

    options = {"model": str(llama), "calib": str(tokens), "eval": str(tokens), "out": str(tmp_path / "out"), **RUN}
    wanda = prune(PruneConfig(**options, allocation="uniform")).masks
    refined = read_masks(manifests[1] / "refinement" / "masks.safetensors")
    for name, packed in wanda.packed.items():
        np.testing.assert_array_equal(refined.packed[name], packed)


def test_an_objective_decides(manifests):
    manifest = manifests[0]["objective"]
    scores = {candidate["lambda"]: candidate["score"] for candidate in manifest["candidates"]["block"]}
    assert manifest["objective"] == "drift"
    assert manifest["chosen"]["block"]["lambda"] == min(scores, key=scores.get)
    assert len({*scores.values()}) == len(scores) and min(scores.values()) > 0


def test_a_family_has_transformers_perplexity(manifests, tokens):
    from eval.perplexity import torch_perplexity

    windows = np.load(tokens)["evaluation"]
    expected = torch_perplexity(str(manifests[1] / "seed_oss"), windows, "float32")
    assert manifests[0]["family"]["token_ppl"]["dense"] == pytest.approx(expected, rel=1e-4)


def test_the_command_line_knows_all_of_them(extended):
    code = "import sys; from neuroal_jax.prune import main; sys.argv = ['x', '--help']; main()"
    printed = " ".join(subprocess.run(
        [sys.executable, "-c", code], cwd=extended, env={**os.environ, "PYTHONPATH": str(extended)},
        capture_output=True, text=True, check=False,
    ).stdout.split())  # fmt: skip
    for expected in (
        "ria",
        "rescaled",
        "--rescaled-share",
        "flow (mean Wanda score)",
        "--flow-lambda",
        "rerank",
        "drift (how far the norms",
        "wikitext103",
    ):
        assert expected in printed
