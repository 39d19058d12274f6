"""Walks that runs keep for each other: taken where nothing differs, bit for bit as if each had walked itself."""

import json
import logging
import os
import shutil

import numpy as np
import pytest

import neuroal_jax
from neuroal_jax.resume import measured as kept
from neuroal_jax.resume import state as states
from tests.resume.test_resume import Killed, files, run

FOUND = ("scores", "candidates", "alignment", "measured", "damping", "token_ppl", "zeros_per_linear", "lambda_block")


@pytest.fixture(scope="module")
def model(make_llama):
    return make_llama(num_hidden_layers=2)


def walks(result):
    return [walk["walk"] for walk in result.manifest["reused"]]


# What two runs have in common: options of both, of the first, of the second, and the walks that the second does not do.
PAIRS = {
    "sparsities": ({"allocation": "owl"}, {}, {"sparsity": 0.5}, ["dense-perplexity", "outliers"]),
    "pruners": ({"allocation": "owl"}, {}, {"pruner": "sparsegpt"}, ["dense-perplexity", "outliers"]),
    "seeds": ({"allocation": "alpha"}, {}, {"seed": 1, "pruner": "magnitude"}, ["dense-perplexity", "spectra"]),
    "calibration": ({"allocation": "alpha"}, {}, {"nsamples": 4}, ["dense-perplexity", "spectra"]),
    "steps": (
        {"pruner": "magnitude", "row_lambdas": "0,0.1,0.2,0.3"},  # as many candidates run together in both
        {"step": "block"},
        {"step": "both"},
        ["dense-perplexity", "search"],
    ),
    "refinements": (
        {"pruner": "magnitude", "row_lambdas": "0,0.1,0.2,0.3", "step": "row"},
        {},
        {"refine": "dsnot"},
        ["dense-perplexity", "alignment", "search"],
    ),
    "distributions": (
        {"pruner": "magnitude", "row_lambdas": "0,0.1,0.2,0.3", "objective": "kl"},
        {"step": "block"},
        {"step": "both"},
        ["dense-perplexity", "dense-distributions", "search"],
    ),
    "methods": ({"pruner": "magnitude"}, {"allocation": "uniform"}, {"step": "block"}, ["dense-perplexity"]),
}


@pytest.mark.parametrize(("both", "first", "second", "shared"), PAIRS.values(), ids=PAIRS.keys())
def test_a_run_takes_what_another_one_measured_and_finds_the_same(model, tokens, tmp_path, both, first, second, shared):
    directory = tmp_path / "measured"
    options = {"candidate_batch": 2, "measured": str(directory), **both}
    began = run(model, tokens, tmp_path / "a", **{**options, **first})
    assert walks(began) == []
    before = {path.name for path in directory.iterdir()}
    found = run(model, tokens, tmp_path / "b", **{**options, **second})
    alone = run(model, tokens, tmp_path / "c", **{**options, **second, "measured": None})
    assert walks(found) == shared
    assert {walk["file"] for walk in found.manifest["reused"]} <= before
    assert {walk["run"] for walk in found.manifest["reused"]} == {str(tmp_path / "a")}
    assert all(walk["seconds"] >= 0 for walk in found.manifest["reused"])
    assert files(tmp_path / "b") == files(tmp_path / "c")
    assert {key: found.manifest[key] for key in FOUND} == {key: alone.manifest[key] for key in FOUND}
    assert "reused" not in alone.manifest


PLAIN = {"allocation": "uniform", "pruner": "magnitude"}
OTHERS = {
    "dtype": {**PLAIN, "dtype": "bfloat16"},
    "owl_m": {"allocation": "owl", "owl_m": 3, "eval": "none"},
    "version": PLAIN,
    "weights": PLAIN,
    "config": PLAIN,
    "tokens": {"allocation": "owl"},  # for calibration, too
}


@pytest.fixture(scope="module")
def measured(model, tokens, tmp_path_factory):
    """What an OWL run kept."""
    root = tmp_path_factory.mktemp("kept")
    run(model, tokens, root / "out", allocation="owl", measured=str(root / "measured"))
    assert len(list((root / "measured").iterdir())) == 2
    return root / "measured"


@pytest.mark.parametrize("name", OTHERS)
def test_what_was_measured_of_something_else_is_not_taken(
    model, make_llama, tokens, measured, tmp_path, monkeypatch, name
):
    if name == "version":
        monkeypatch.setattr("neuroal_jax.run.identity.__version__", "0")
    if name == "weights":
        model = make_llama(num_hidden_layers=2, seed=5)
    if name == "config":
        changed = shutil.copytree(model, tmp_path / "changed")
        config = json.loads((model / "config.json").read_text())
        (changed / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
        model = changed
    if name == "tokens":
        found, other = np.load(tokens), tmp_path / "tokens.npz"
        np.savez(other, calibration=found["calibration"] ^ 1, evaluation=found["evaluation"] ^ 1)
        tokens = other
    directory = shutil.copytree(measured, tmp_path / "measured")
    assert walks(run(model, tokens, tmp_path / "out", measured=str(directory), **OTHERS[name])) == []
    assert len(list(directory.iterdir())) > 2


def test_the_model_may_move_and_be_touched(model, tokens, measured, tmp_path):
    moved = shutil.copytree(model, tmp_path / "moved")
    os.utime(moved / "model.safetensors")
    options = {"allocation": "owl", "measured": str(measured), "nsamples": 77}  # of 6 sequences: all in both
    assert walks(run(moved, tokens, tmp_path / "out", **options)) == ["dense-perplexity", "outliers"]


def truncate(path, other):
    os.truncate(path, path.stat().st_size // 2)


def flip(path, other):
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)


def exchange(path, other):
    shutil.copy(other, path)


def no_file(path, other):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, exchange, no_file])
def test_a_damaged_file_is_measured_anew(model, tokens, measured, tmp_path, caplog, damage):
    directory = shutil.copytree(measured, tmp_path / "measured")
    first, second = sorted(directory.iterdir())
    damage(first, second)
    damage(second, measured / first.name)
    with caplog.at_level(logging.INFO, "neuroal_jax"):
        found = run(model, tokens, tmp_path / "out", allocation="owl", measured=str(directory))
    assert caplog.text.count("measuring anew") == 2
    assert walks(found) == []
    assert files(tmp_path / "out") == files(measured.parent / "out")
    again = run(model, tokens, tmp_path / "again", allocation="owl", measured=str(directory))
    assert walks(again) == ["dense-perplexity", "outliers"]


@pytest.mark.parametrize("lost", [False, True])
def test_a_killed_run_goes_on_with_what_it_took_even_if_that_is_lost(
    model, tokens, measured, tmp_path, monkeypatch, lost
):
    monkeypatch.setattr(states, "_SHARE", 0)
    directory = shutil.copytree(measured, tmp_path / "measured")
    options = {"allocation": "owl", "sparsity": 0.5, "measured": str(directory)}
    write, left = states.State._write, [2]

    def write_and_end(self, *args):
        write(self, *args)
        left[0] -= 1
        if not left[0]:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(states.State, "_write", write_and_end)
        run(model, tokens, tmp_path / "out", **options)
    if lost:
        shutil.rmtree(directory)
    with monkeypatch.context() as patch:
        patch.setattr("neuroal_jax.walk.programs.observe", None)  # the outliers are in the state
        result = run(model, tokens, tmp_path / "out", resume=True, **options)
    assert walks(result) == ([] if lost else ["dense-perplexity", "outliers"])
    alone = run(model, tokens, tmp_path / "alone", **{**options, "measured": None})
    assert files(tmp_path / "out") == files(tmp_path / "alone")
    assert result.manifest["token_ppl"] == alone.manifest["token_ppl"]


def test_a_walk_of_a_model_that_changed_meanwhile_is_not_kept(tmp_path):
    def check():
        raise neuroal_jax.UserError("model.safetensors changed")

    place = kept.Measured(tmp_path / "measured", {"model": "a"}, "run", check)
    with pytest.raises(neuroal_jax.UserError, match="changed"):
        place.keep("spectra", {}, [{"found": 1.0}], 0.5)
    assert not (tmp_path / "measured").exists()


def test_a_directory_that_cannot_be_written_stops_no_run(model, tokens, tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.INFO, "neuroal_jax"):
        run(model, tokens, tmp_path / "out", allocation="uniform", measured=str(tmp_path / "file"))
    assert f"dense-perplexity is not kept in {tmp_path / 'file'}" in caplog.text
    assert (tmp_path / "out" / "manifest.json").exists()


def test_nothing_is_kept_in_an_input(model, tokens, tmp_path):
    before = sorted(model.iterdir())
    for place in (model, model / "measured"):
        with pytest.raises(neuroal_jax.UserError, match="--measured"):
            run(model, tokens, tmp_path / "out", measured=str(place))
    with pytest.raises(neuroal_jax.UserError, match=r"--measured .* lies in --save-model"):
        run(model, tokens, tmp_path / "out", measured=str(tmp_path / "m" / "x"), save_model=str(tmp_path / "m"))
    assert sorted(model.iterdir()) == before
