"""Searches by what the head says: against the logits of the models that they leave."""

import json
import logging

import numpy as np
import pytest

import neuroal_jax
from neuroal_jax import UserError, load_model
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.masks.budget import Budget
from neuroal_jax.numerics import loss
from neuroal_jax.search import block_step
from neuroal_jax.walk import programs, search
from neuroal_jax.walk.blocks import Blocks
from neuroal_jax.walk.method import make_method
from tests.conftest import RUN
from tests.walk.test_head import log_softmax


@pytest.fixture(scope="module")
def model(make_llama):
    return make_llama(num_hidden_layers=2)


def run(model, tokens, out, **options):
    options = {**RUN, "calib": str(tokens), "eval": "none", "search_samples": 6, **options}
    return neuroal_jax.prune(neuroal_jax.PruneConfig(model=str(model), out=str(out), **options))


def by_hand(model, saved, ids):
    """KL and loss of a saved model from its whole logits, means over windows."""
    dense, pruned = (log_softmax(np.asarray(load_model(str(path))(ids), np.float64)) for path in (model, saved))
    chosen = np.take_along_axis(pruned[:, :-1], ids[:, 1:, None], axis=-1)
    return {"kl": (np.exp(dense) * (dense - pruned)).sum(axis=-1).mean(), "loss": -chosen.mean()}


@pytest.mark.parametrize("objective", ["kl", "loss"])
def test_the_winners_score_is_that_of_the_model_that_it_leaves(model, tokens, tmp_path, objective):
    """The search set being all of the calibration set, the search and the final pruning choose the same weights."""
    options = {"objective": objective, "save_model": str(tmp_path / "model")}
    manifest = run(model, tokens, tmp_path / "out", **options).manifest
    ids = np.load(tokens)["calibration"].astype(np.int32)
    assert min(manifest["scores"]["row"]) == pytest.approx(by_hand(model, tmp_path / "model", ids)[objective], rel=1e-5)
    assert manifest["objective"] == objective
    assert manifest["alignment"] is None
    assert len(manifest["scores"]["block"]) == 2
    assert manifest["traces"].get("compare", 1) == 1  # for the row step's D - S
    assert "compare_last" not in manifest["traces"]
    assert objective in (tmp_path / "out" / "report.html").read_text()


def test_candidates_that_run_together_change_nothing(model, tokens, tmp_path):
    """As for alignment: one by one where any number runs together."""
    found = []
    for batch in (1, 2, 3):
        run(model, tokens, tmp_path / str(batch), objective="kl", candidate_batch=batch)
        found.append((tmp_path / str(batch) / "masks.safetensors").read_bytes())
    assert found[1:] == found[:-1]


def test_a_pruner_without_statistics_runs_no_dense_block(model, tokens, tmp_path, monkeypatch):
    for program in ("dense_run", "dense_runs", "compare", "compare_last"):
        monkeypatch.setattr(programs, program, None)
    result = run(model, tokens, tmp_path / "out", objective="loss", pruner="magnitude", step="block")
    assert len(set(result.manifest["scores"]["block"])) == 2


def test_a_row_step_alone_scores_its_base_too(model, tokens, tmp_path):
    scores = run(model, tokens, tmp_path / "out", objective="kl", pruner="magnitude", step="row").manifest["scores"]
    assert scores["row"][0] == pytest.approx(scores["block"][0], rel=1e-6)  # lambda 0
    assert len(scores["row"]) == 3


def test_progress_counts_what_tokens_are_multiplied_by(model, monkeypatch):
    monkeypatch.setattr("neuroal_jax.walk.blocks._SLICE_TOKENS", 40)
    checkpoint, told = open_checkpoint(str(model)), []
    block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 56
    ids = np.zeros((2, 16), np.int32)
    for pruner, runs in (("wanda", 2), ("magnitude", 1)):
        method = make_method(pruner)
        budget = Budget(checkpoint.linear_shapes(), 2, 0.5, "exact", method.pattern)
        counts = [budget.counts(block_step.candidate(0.5, x, list(budget.shapes), 2)) for x in (0.1, 0.2, 0.3)]
        search.score_by_head(Blocks(checkpoint, "float32"), method, loss, None, ids, counts, 2, told.append)
        assert told == [0, *2 * [2 * runs * block, runs * block, 0], 3 * 40 * 32, 3 * 40 * 32, 3 * 16 * 32]
        assert sum(told) == 3 * search.work(checkpoint, method)
        told.clear()


def test_a_small_search_set_is_warned_of(model, tokens, tmp_path, caplog):
    options = {"pruner": "magnitude", "step": "block", "block_lambdas": "0.1"}
    for objective, lines in (("alignment", 0), ("loss", 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "neuroal_jax"):
            run(model, tokens, tmp_path / objective, objective=objective, **options)
        assert caplog.text.count("the search set has 96 tokens; below 2048, a search by loss overfits") == lines


def test_the_plan_holds_the_head(model):
    config = {"model": str(model), "sparsity": 0.7, "dry_run": True, "seqlen": 16, "nsamples": 8, "eval": "none"}

    def peak(objective):
        return neuroal_jax.prune(neuroal_jax.PruneConfig(**config, objective=objective, candidate_batch=1)).plan

    alignment, by_loss, by_kl = map(peak, ("alignment", "loss", "kl"))
    assert by_loss.device_peak >= alignment.device_peak
    assert by_kl.device_peak >= by_loss.device_peak + 8 * 16 * 4 * 32
    assert by_kl.state_bytes == alignment.state_bytes + 8 * 16 * 4 * (32 + 3)


def test_what_an_objective_goes_with():
    def config(**options):
        return neuroal_jax.PruneConfig(model="m", out="o", sparsity=0.5, **options)

    assert config().objective == config(objective="auto").objective == config(allocation="owl").objective == "alignment"
    assert config(objective="kl").objective == "kl"
    assert config(objective="kl", allocation="owl", budget="reference")  # no search: without effect
    with pytest.raises(UserError, match="--objective loss does not go with --budget reference"):
        config(objective="loss", budget="reference")
    with pytest.raises(UserError, match="--objective perplexity is unknown: expected one of auto, alignment, kl, loss"):
        config(objective="perplexity")


def test_the_manifest_names_the_objective_only_of_a_search(model, tokens, tmp_path):
    run(model, tokens, tmp_path / "out", allocation="uniform", objective="kl")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["objective"] is None
