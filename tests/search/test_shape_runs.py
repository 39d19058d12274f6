"""Whole runs with the search over shapes: the same masks however candidates are batched, what is recorded and told."""

import json
import logging

import numpy as np
import pytest

import neuroal_jax
from neuroal_jax.masks import load_masks
from neuroal_jax.report import run_report
from neuroal_jax.report.run_plots import run_sections
from tests.conftest import RUN


def run(model, tokens, out, **options):
    config = {**RUN, "model": str(model), "calib": str(tokens), "eval": "none", "out": str(out), "allocation": "shape"}
    return neuroal_jax.prune(neuroal_jax.PruneConfig(**{**config, **options}))


@pytest.fixture(scope="module")
def finished(llama, tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("shape") / "out"
    return run(llama, tokens, out), out


def test_every_candidate_batch_gives_the_same_bytes(llama, tokens, tmp_path, finished):
    expected = (finished[1] / "masks.safetensors").read_bytes()
    for batch in (1, 2):
        run(llama, tokens, tmp_path / f"batch{batch}", candidate_batch=batch)
        assert (tmp_path / f"batch{batch}" / "masks.safetensors").read_bytes() == expected, batch


def test_all_that_was_tried_is_recorded_and_drawn(finished):
    result, out = finished
    manifest = json.loads((out / "manifest.json").read_text())
    candidates = manifest["candidates"]
    assert {stage: len(found) for stage, found in candidates.items()} == {
        "profiles": 6,
        "directions": 10,  # three blocks show two waves
        "line": 5,
        "rows": 3,
    }
    assert [each["profile"] for each in candidates["profiles"]] == [
        *("uniform", "ramp 0.1", "ramp 0.2", "owl", "dlp", "alpha")
    ]
    assert manifest["measured"].keys() == {"outliers", "medians", "alphas"}
    for stage, found in manifest["gains"].items():
        assert found["kept"] == (stage in manifest["chosen"])
    best = min(each["score"] for found in candidates.values() for each in found)
    last = [stage for stage in candidates if stage in manifest["chosen"]][-1]
    assert best == min(each["score"] for each in candidates[last]) or not all(
        found["kept"] for found in manifest["gains"].values()
    )
    assert result.manifest["sparsity"]["zeros"] == round(0.6 * result.manifest["sparsity"]["prunable"])
    allocation = json.loads((out / "allocation.json").read_text())
    assert allocation["method"] == "shape"
    (course,) = [section for section in run_sections(manifest, allocation) if section.name == "course"]
    (plot,) = course.figures.values()
    drawn = {trace.name: trace for trace in plot.data}
    assert [*drawn] == [*candidates, "winners"]
    for stage, found in candidates.items():
        assert drawn[stage].y == tuple(each["score"] for each in found)
    assert len(drawn["winners"].x) == len(manifest["chosen"])
    places = [x for stage in candidates for x in drawn[stage].x]
    assert places == list(range(24))
    assert "direction depth 1, distance -0.05" in drawn["directions"].text
    page = run_report(manifest, allocation)
    assert "Course of the search" in page


def test_what_each_stage_gave_is_told(llama, tokens, tmp_path, caplog):
    few = {"shape_ramps": "none", "shape_depth": 0, "shape_etas": "1", "shape_row_lambdas": "0.1", "shape_guard": 1e9}
    with caplog.at_level(logging.INFO, "neuroal_jax"):
        result = run(llama, tokens, tmp_path / "out", **few)
    assert [len(found) for found in result.manifest["candidates"].values()] == [4, 1, 6, 1]
    for stage in result.manifest["gains"]:
        assert f"{stage} step: " in caplog.text
    assert " than the best before" in caplog.text
    assert caplog.text.count("the search set has 96 tokens; below 2048, a search by kl overfits") == 1


@pytest.mark.slow
def test_sparsegpt_has_no_rows_and_says_so(llama, tokens, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "neuroal_jax"):
        result = run(llama, tokens, tmp_path / "out", pruner="sparsegpt", sparsegpt_group=24)
    assert "the search goes on with --shape-row-lambdas none" in caplog.text
    assert list(result.manifest["candidates"]) == ["profiles", "directions", "line"]
    masks = load_masks(tmp_path / "out" / "masks.safetensors")
    assert sum(int((~mask).sum()) for mask in masks.values()) == result.manifest["sparsity"]["pruned"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("shape_ramps", "0.1,x", "--shape-ramps is 'x', expected a number from 0 to 0.5"),
        ("shape_ramps", "0.1,0.1", "--shape-ramps is .*expected every number once"),
        ("shape_row_lambdas", "", "--shape-row-lambdas is empty, expected numbers like 0.1,0.2, or none"),
        ("shape_row_lambdas", "0.6", "--shape-row-lambdas is 0.6, expected a number from 0 to 0.5"),
        ("shape_etas", "nan", "--shape-etas is nan"),
        ("shape_depth", "1.5", "--shape-depth is 1.5, expected a whole number"),
        ("shape_depth", "65", "--shape-depth is 65, expected a whole number from 0 to 64"),
        ("shape_width", "0", "--shape-width is 0"),
        ("shape_guard", "-1", "--shape-guard is -1"),
    ],
)
def test_bad_values_are_refused(name, value, message):
    with pytest.raises(neuroal_jax.UserError, match=message):
        neuroal_jax.PruneConfig(model="demo", sparsity=0.5, allocation="shape", out="out", **{name: value})


def test_options_are_read_alike_from_text_and_lists():
    options = {"model": "demo", "sparsity": 0.5, "allocation": "shape", "out": "out"}
    config = neuroal_jax.PruneConfig(**options, shape_etas="0.5, 1", shape_row_lambdas="none")
    assert (config.shape_etas, config.shape_row_lambdas) == ((0.5, 1.0), ())
    assert neuroal_jax.PruneConfig(**options, shape_etas=[0.5, 1], shape_row_lambdas=[]) == config
    with pytest.raises(neuroal_jax.UserError, match=r"--shape-guard 2.0 has no effect without --allocation shape"):
        neuroal_jax.PruneConfig(**{**options, "allocation": "owl"}, shape_guard=2)
    assert np.isclose(neuroal_jax.PruneConfig(**options).shape_width, 0.05)
